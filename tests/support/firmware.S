# Firmware for a PC: it finds edu (1234:11e8) on bus 0, and has it carry a counter through guest memory for ever.
# Where there is no edu, it counts. It suspends itself to RAM when it is asked, and counts on when it is woken.
#
#   STATUS + 0   rounds begun           STATUS + 4   what came back to DST in the last one
#   STATUS + 8   edu's identification   STATUS + 12  how often it was woken
#   STATUS + 16  MAGIC: it counts       STATUS + 32  after so many rounds, and as many more, it is suspended; 0: never
#   SRC          4 KiB, the counter in front: memory -> edu's buffer       DST   the same: edu's buffer -> memory
#
# as --32; ld -m elf_i386 -Ttext 0xffff0000 --oformat binary: 64 KiB, which end where the processor begins.

	.set STATUS, 0x100000
	.set SRC, 0x200000
	.set DST, 0x300000
	.set BAR, 0xe0000000
	.set BUFFER, 0x40000
	.set MAGIC, 0x5333
	.set LPC, 0x8000f800		# configuration address of 00:1f.0, which has the power management
	.set PM, 0x600

	.macro	configure register, value	# of the function whose configuration address is in ebx
	leal	\register(%ebx), %eax
	movw	$0xcf8, %dx
	outl	%eax, %dx
	movl	$\value, %eax
	movw	$0xcfc, %dx
	outl	%eax, %dx
	.endm

	.macro	carry from, to, command		# has edu do it, and waits until it is done
	movl	$\from, 0x80(%esi)
	movl	$\to, 0x88(%esi)
	movl	$4096, 0x90(%esi)
	movl	$\command, 0x98(%esi)
1:
	testl	$1, 0x98(%esi)
	jnz	1b
	.endm

	.include "protected.S"

	movl	$LPC, %ebx
	configure 0x40, PM+1		# where its ports are
	configure 0x44, 0x80		# they are enabled

	xorl	%ebp, %ebp
	cmpl	$MAGIC, STATUS + 16
	jne	first
	movl	STATUS, %ebp
	incl	STATUS + 12
first:
	movl	$MAGIC, STATUS + 16

	xorl	%esi, %esi
	movl	$0x80000000, %ebx	# configuration address of 00:00.0
find:
	movl	%ebx, %eax
	movw	$0xcf8, %dx
	outl	%eax, %dx
	movw	$0xcfc, %dx
	inl	%dx, %eax
	cmpl	$0x11e81234, %eax
	je	found
	addl	$0x800, %ebx
	cmpl	$0x80010000, %ebx
	jb	find
	jmp	round
found:
	configure 0x10, BAR		# BAR 0
	configure 4, 6			# command: memory, bus master

	movl	$BAR, %esi
	movl	(%esi), %eax
	movl	%eax, STATUS + 8
round:
	incl	%ebp
	movl	%ebp, SRC
	movl	%ebp, STATUS
	testl	%esi, %esi
	jz	rest
	carry	SRC, BUFFER, 1
	carry	BUFFER, DST, 3
	movl	DST, %eax
	movl	%eax, STATUS + 4
rest:
	movl	STATUS + 32, %ecx
	testl	%ecx, %ecx
	jz	round
	movl	%ebp, %eax
	xorl	%edx, %edx
	divl	%ecx
	testl	%edx, %edx
	jnz	round
	movw	$PM + 4, %dx		# suspend to RAM
	movw	$0x2400, %ax
	outw	%ax, %dx
still:
	hlt
	jmp	still

	.align 8
gdt:
	.quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:
	.word gdtr - gdt - 1
	.long gdt

	.org 0xfff0
	.code16
	jmp	real
	.org 0x10000
