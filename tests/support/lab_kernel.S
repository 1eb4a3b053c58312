/*
 * The start of an image whose kernel is not packed: it puts the kernel where it runs, and enters it.
 *
 *   start32   of a boot loader, in protected mode, %esi the boot parameters
 *   start64   0x200 bytes behind it: of kexec, in long mode, memory mapped as it lies, %rsi the boot parameters
 *
 * TEXT is where the kernel's text lies in the image, SIZE how much of it is moved, ENTRY where it is entered, all in
 * bytes. It moves upwards: the room for it is that which unpacking takes (init_size).
 * Source: Documentation/arch/x86/boot.rst; arch/x86/boot/compressed/head_64.S
 */
	.set	ALIGNMENT, 0x200000
	.set	LOWEST, 0x1000000	/* LOAD_PHYSICAL_ADDR */

	.code32
start32:
	cli
	leal	0x1e8(%esi), %esp	/* boot parameters have a scratch word */
	call	1f
1:	popl	%ebp
	subl	$1b, %ebp

	/* the first 4 GiB as they lie: one table of tables, four of them, 2 MiB a page */
	leal	tables(%ebp), %edi
	leal	0x1003(%edi), %eax
	movl	%eax, (%edi)
	leal	0x1000(%edi), %ebx
	movl	$4, %ecx
2:	addl	$0x1000, %eax
	movl	%eax, (%ebx)
	addl	$8, %ebx
	loop	2b
	leal	0x2000(%edi), %ebx
	movl	$0x83, %eax
	movl	$2048, %ecx
3:	movl	%eax, (%ebx)
	addl	$8, %ebx
	addl	$ALIGNMENT, %eax
	loop	3b

	leal	gdt(%ebp), %eax
	movl	%eax, 2(%eax)
	lgdt	(%eax)
	movl	%cr4, %eax
	orl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	%edi, %cr3
	movl	$0xc0000080, %ecx	/* EFER */
	rdmsr
	orl	$0x100, %eax		/* LME */
	wrmsr
	leal	4f(%ebp), %eax
	movl	%eax, far(%ebp)
	movl	$0x80000001, %eax	/* PG, PE */
	movl	%eax, %cr0
	ljmpl	*far(%ebp)
4:	.code64
	jmp	start64

	.balign	8
gdt:	.word	23
	.long	0
	.word	0
	.quad	0
	.quad	0x00af9b000000ffff	/* 0x10: code of 64 bits */
far:	.long	0
	.word	0x10

	.org	0x200
start64:
	cli
	movq	%rsi, %r15
	leaq	start32(%rip), %rbx
	leaq	TEXT + ALIGNMENT - 1(%rbx), %rax
	andq	$-ALIGNMENT, %rax
	cmpq	$LOWEST, %rax
	jae	5f
	movq	$LOWEST, %rax
5:	leaq	TEXT + SIZE - 8(%rbx), %rsi
	leaq	SIZE - 8(%rax), %rdi
	movl	$(SIZE / 8), %ecx
	std
	rep movsq
	cld
	movq	%r15, %rsi
	addq	$ENTRY, %rax
	jmp	*%rax

	.org	0x1000
tables:
	.org	0x7000
