# Guests that mean no good (tests/e2e/hostile.py): entered by PVH, say so on the serial port, and then do what KIND
# (--defsym) tells, for ever.
    .set SERIAL, 0x3f8
    .set WINDOW, 0x8000000000     # linear addresses of the second entry of the topmost table
    .set SCRATCH, 0x2000000       # 32 MiB from here on are nobody's

    .section .note.GNU-stack, "", @progbits
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                # sizes of name and value; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

    .text
    .code32
    .globl start32
start32:
    mov $stack, %esp
    # Identity page tables of the first GiB in pages of 2 MiB. Under WINDOW every page is one and the same.
    movl $pdpt + 3, pml4
    movl $all_pdpt + 3, pml4 + 8
    movl $directory + 3, pdpt
    mov $directory, %edi
    mov $0x83, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 1b
    mov $512, %ecx
2:  movl $all_directory + 3, all_pdpt - 8(, %ecx, 8)
    movl $all_table + 3, all_directory - 8(, %ecx, 8)
    movl $page + 3, all_table - 8(, %ecx, 8)
    loop 2b
    mov $pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax                # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx         # EFER
    rdmsr
    or $0x100, %eax               # LME
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax          # PG
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

    .code64
start64:
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack, %esp
    mov $said, %esi
    mov $SERIAL, %edx
1:  lodsb
    test %al, %al
    jz 2f
    outb %al, (%dx)
    jmp 1b
2:  cli

    .if KIND == 1                 # jumps to where there is nothing, with a handler that does so again
    lidt idt_pointer
    mov $idt, %edi
    mov $nowhere, %eax
    mov $256, %ecx
3:  mov %ax, (%rdi)
    movl $0x8e000008, 2(%rdi)
    mov %eax, %ebx
    shr $16, %ebx
    mov %bx, 6(%rdi)
    add $16, %edi
    loop 3b
nowhere:
    mov $stack, %esp
    mov $0x7fff00000000, %rax     # not mapped
    incl count
    testl $1, count
    jz 4f
    mov $0x30000000, %eax         # mapped to where there is no memory
4:  jmp *%rax
    .endif

    .if KIND == 2                 # shuts down, and does so again after the reset
    lidt no_idt
    ud2
    .endif

    .if KIND == 3                 # a loop without interrupts
    jmp .
    .endif

    .if KIND == 4                 # code that changes itself, each time around
3:  mov $0, %eax
    incl 3b + 1
    jmp 3b
    .endif

    .if KIND == 5                 # runs through a page that is everywhere
    mov $page, %edi
    mov $0x90, %al
    mov $4096, %ecx
    rep stosb
    mov $WINDOW, %rax
    jmp *%rax
    .endif

    .if KIND == 6                 # the same, of instructions that hold interrupts back
    mov $page, %edi
    mov $0xd08e, %eax             # mov %eax, %ss
    mov $2048, %ecx
    rep stosw
    xor %eax, %eax
    mov $WINDOW, %rbx
    jmp *%rbx
    .endif

    .if KIND == 7                 # 32 MiB of code, always other code
3:  mov $SCRATCH, %edi
    mov $0x100000, %ecx
    incl count
    mov count, %eax
4:  movb $0xb8, (%rdi)            # mov $..., %eax
    mov %eax, 1(%rdi)
    movl $0x000003e9, 5(%rdi)     # jmp to 3 bytes behind
    movb $0, 9(%rdi)
    add $13, %edi
    inc %eax
    loop 4b
    movb $0xe9, (%rdi)
    mov $3b - 5, %eax
    sub %edi, %eax
    mov %eax, 1(%rdi)
    mov $SCRATCH, %eax
    jmp *%rax
    .endif

    .if KIND == 8                 # an exception whose handler goes back to it
    lidt idt_pointer
    mov $idt + 6 * 16, %edi       # #UD
    mov $5f, %eax
    mov %ax, (%rdi)
    movl $0x8e000008, 2(%rdi)
    shr $16, %eax
    mov %ax, 6(%rdi)
    ud2
5:  iretq
    .endif

    .data
said: .asciz "hostile\n"
    .balign 8
gdt: .quad 0, 0x00af9a000000ffff
gdt_pointer: .word 15
    .quad gdt
idt_pointer: .word 0xfff
    .quad idt
no_idt: .word 0
    .quad 0
count: .long 0

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
directory: .skip 4096
all_pdpt: .skip 4096
all_directory: .skip 4096
all_table: .skip 4096
page: .skip 4096
idt: .skip 4096
    .skip 4096
stack:
