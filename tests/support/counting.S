# Firmware for a PC that checks its memory: each word of a range holds its address and the number of the round that wrote
# it last; every round looks whether each is as the one before left it, and writes it anew.
#
#   STATUS + 0   rounds that have ended      STATUS + 4   words that were not as they should be
#   START..END   the range
#
# as --32; ld -m elf_i386 -Ttext 0xffff0000 --oformat binary: 64 KiB, which end where the processor begins.

	.set STATUS, 0x100000
	.set START, 0x400000
	.set END, 0x800000

	.include "protected.S"

	movl	$START, %edi
fill:
	movl	%edi, (%edi)
	addl	$4, %edi
	cmpl	$END, %edi
	jb	fill

	xorl	%ebp, %ebp
round:
	incl	%ebp
	movl	$START, %edi
word:
	leal	-1(%edi, %ebp), %eax
	cmpl	%eax, (%edi)
	je	right
	incl	STATUS + 4
right:
	incl	%eax
	movl	%eax, (%edi)
	addl	$4, %edi
	cmpl	$END, %edi
	jb	word
	movl	%ebp, STATUS
	jmp	round

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
