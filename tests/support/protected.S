# How firmware begins: from the processor's real mode into a flat protected one of 32 bits.

	.text
	.org 0xf000
	.code16
real:
	cli
	lgdtl	%cs:0xf000 + gdtr - real
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$8, $protected

	.code32
protected:
	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
