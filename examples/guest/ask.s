# Asks the host for a name and greets it, by two hostcalls, in 64-bit ring 3 at any address. examples/hostcall.py contains
# it as bytes. Assemble it with:
#   as ask.s -o ask.o && objcopy -O binary -j .text ask.o ask.bin
	.intel_syntax noprefix
	mov edx, 0x7076
	lea rax, [rip + prompt]
	mov [rip + ask + 32], rax	# the first argument's address
	lea rax, [rip + name]
	mov [rip + ask + 48], rax	# the second's
	mov [rip + say + 32], rax
	lea rax, [rip + ask]
	out dx, eax
	mov eax, [rip + ask + 8]	# the result: the bytes of the name
	mov [rip + say + 28], eax
	lea rax, [rip + say]
	out dx, eax
	mov eax, [rip + say + 4]	# the status
	out 0xf4, al

	.balign 8
ask:	.long 1, -1			# number, status
	.quad 0				# result
	.long 2, 0			# count of arguments
	.long 2, name - prompt		# bytes
	.quad 0
	.long 3, 32			# a buffer
	.quad 0
say:	.long 2, -1
	.quad 0
	.long 1, 0
	.long 2, 0
	.quad 0
prompt:	.ascii "Who are you?"
name:	.fill 32, 1, 0
