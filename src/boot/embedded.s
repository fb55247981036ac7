# The guest inside the package: 64-bit ring 3, position-independent, on COM1.
# It greets, measures its loop and its port exits, answers the lines it is sent, and ends through the exit port.
# RDI holds the vCPU's number; the stack stands right below this code.

    .pushsection .rodata.pyvmm_guest, "a", @progbits
    .balign 16
    .globl pyvmm_guest_start, pyvmm_guest_settings, pyvmm_guest_end
    .hidden pyvmm_guest_start, pyvmm_guest_settings, pyvmm_guest_end

    .set PYVMM_COM1, 0x3f8
    .set PYVMM_LINE_STATUS, 0x3fd
    .set PYVMM_LINE_SIZE, 200

pyvmm_guest_start:
    test edi, edi
    jnz 90f
    lea rsi, [rip + 80f]
    call 60f

    # A loop of two instructions, a hundred million times.
    call 50f
    mov r12, rax
    mov ecx, 100000000
1:  dec ecx
    jnz 1b
    call 50f
    sub rax, r12
    lea rsi, [rip + 81f]
    call 65f

    # A thousand reads of a port: each goes to the host and back.
    call 50f
    mov r12, rax
    mov ecx, 1000
    mov edx, PYVMM_LINE_STATUS
2:  in al, dx
    dec ecx
    jnz 2b
    call 50f
    sub rax, r12
    xor edx, edx
    mov ecx, 1000
    div rcx
    lea rsi, [rip + 82f]
    call 65f

    # A conversation, if somebody is there.
    cmp byte ptr [rip + pyvmm_guest_settings], 0
    jne 3f
    mov edx, PYVMM_LINE_STATUS
    in al, dx
    test al, 1
    jz 9f
3:  lea rsi, [rip + 83f]
    call 60f
    sub rsp, 256
    mov rbx, rsp                    # the line
    xor r14d, r14d                  # its length
    xor r13d, r13d                  # the byte before
4:  call 55f
    mov r15d, r13d
    mov r13d, eax
    cmp al, 4                       # ^D
    je 9f
    cmp al, 13
    je 6f
    cmp al, 10
    je 5f
    cmp al, 8
    je 7f
    cmp al, 127
    je 7f
    cmp r14d, PYVMM_LINE_SIZE
    jae 4b
    mov [rbx + r14], al
    inc r14d
    mov edx, PYVMM_COM1             # echo
    out dx, al
    jmp 4b
5:  cmp r15b, 13                    # the LF of a CR LF
    je 4b
6:  test r14d, r14d
    jz 9f
    lea rsi, [rip + 84f]
    call 60f
    mov byte ptr [rbx + r14], 0
    mov rsi, rbx
    call 60f
    lea rsi, [rip + 85f]
    call 60f
    xor r14d, r14d
    jmp 4b
7:  test r14d, r14d                 # rub the last byte out
    jz 4b
    dec r14d
    lea rsi, [rip + 86f]
    call 60f
    jmp 4b

9:  lea rsi, [rip + 87f]
    call 60f
    movzx edx, word ptr [rip + pyvmm_guest_settings + 2]
    xor eax, eax
    test edx, edx
    jnz 10f
    mov edx, 0x64                   # no exit port: the keyboard controller resets the machine
    mov al, 0xfe
10: out dx, al
90: pause                           # other vCPUs have nothing to do
    jmp 90b

# RAX: the time-stamp counter. Changes RDX.
50: rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# EAX: the next byte of input. Changes RCX, RDX.
55: mov edx, PYVMM_LINE_STATUS
    in al, dx
    test al, 1
    jnz 57f
    mov ecx, 20000                  # about a millisecond: a person does not type faster
56: pause
    dec ecx
    jnz 56b
    jmp 55b
57: mov edx, PYVMM_COM1
    in al, dx
    movzx eax, al
    ret

# Print the text at RSI, up to its zero. Changes RAX, RDX, RSI.
60: mov edx, PYVMM_COM1
61: lodsb
    test al, al
    jz 62f
    out dx, al
    jmp 61b
62: ret

# Print the text at RSI, the number in RAX and the unit behind it. Changes RAX, RCX, RDX, RSI, RDI.
65: push rax
    call 60b
    pop rax
    sub rsp, 32
    lea rdi, [rsp + 31]
    mov byte ptr [rdi], 0
    mov ecx, 10
66: xor edx, edx
    div rcx
    add dl, 48
    dec rdi
    mov [rdi], dl
    test rax, rax
    jnz 66b
    mov rsi, rdi
    call 60b
    add rsp, 32
    lea rsi, [rip + 88f]
    jmp 60b

80: .asciz "Hello from a guest of pyvmm: 64-bit code in ring 3.\r\n"
81: .asciz "A loop of 100,000,000 turns: "
82: .asciz "A port read, to the host and back: "
83: .asciz "Type a line; an empty one ends.\r\n"
84: .asciz "\r\nYou typed: "
85: .asciz "\r\n"
86: .asciz "\b \b"
87: .asciz "Goodbye.\r\n"
88: .asciz " cycles\r\n"

# Set by the host: byte 0, whether input is connected; word at 2, the exit port or zero.
    .balign 4
pyvmm_guest_settings:
    .byte 0, 0
    .word 0xf4
pyvmm_guest_end:
    .popsection
