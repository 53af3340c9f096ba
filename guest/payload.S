# A guest of a few thousand instructions for hosts too slow for a kernel (scripts/vmx-check). Entered by PVH; says on
# the serial port how far it came, and leaves by isa-debug-exit: with 0x21 (status 67) where all went well, else 1.
    .set SERIAL, 0x3f8
    .set DEBUG_EXIT, 0x501
    .set LOCAL_APIC, 0xfee00000
    .set VIRTIO_SLOTS, 0xfeb00000
    .set TIMER_VECTOR, 0x40

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
    mov $said32, %esi
    call print32
    # Identity page tables of the first 4 GiB in pages of 2 MiB.
    mov $pml4, %edi
    movl $pdpt + 3, (%edi)
    mov $pdpt, %edi
    mov $directories + 3, %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x1000, %eax
    loop 1b
    mov $directories, %edi
    mov $0x83, %eax
    mov $2048, %ecx
2:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
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

print32:
    mov $SERIAL, %edx
1:  lodsb
    test %al, %al
    jz 2f
    outb %al, (%dx)
    jmp 1b
2:  ret

    .code64
start64:
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack, %esp
    mov $said64, %esi
    call print
    lidt idt_pointer

    # KVM's own CPUID leaves: the engine's list reached the processor.
    mov $0x40000000, %eax
    cpuid
    cmp $0x4b4d564b, %ebx         # "KVMK"
    jne fail
    mov $said_cpuid, %esi
    call print

    # RAM: a page every 2 MiB of 32 is written and read back, each for the first time.
    mov $0x2000000, %ebx
    mov $16, %ecx
1:  mov %rbx, (%rbx)
    add $0x200000, %rbx
    loop 1b
    mov $16, %ecx
2:  sub $0x200000, %rbx
    cmp %rbx, (%rbx)
    jne fail
    loop 2b
    mov $said_ram, %esi
    call print

    # Device registers: the first virtio-mmio slot says "virt".
    mov $VIRTIO_SLOTS, %ebx
    cmpl $0x74726976, (%rbx)
    jne fail
    mov $said_mmio, %esi
    call print

    # The local APIC's timer wakes the processor from HLT.
    mov $idt + TIMER_VECTOR * 16, %edi
    mov $on_timer, %eax
    mov %ax, (%rdi)
    movl $0x8e000008, 2(%rdi)     # selector 8, present interrupt gate
    shr $16, %eax
    mov %ax, 6(%rdi)
    mov $LOCAL_APIC, %ebx
    movl $0x1ff, 0xf0(%rbx)       # enabled
    movl $0xb, 0x3e0(%rbx)        # divided by 1
    movl $TIMER_VECTOR, 0x320(%rbx)
    movl $100000, 0x380(%rbx)
3:  sti
    hlt
    cli
    cmpl $1, ticks
    jne 3b
    mov $said_timer, %esi
    call print
    mov $0x21, %al
    jmp leave
fail:
    mov $said_fail, %esi
    call print
    mov $1, %al
leave:
    mov $DEBUG_EXIT, %edx
    outb %al, (%dx)
    hlt
    jmp leave

on_timer:
    incl ticks
    push %rbx
    mov $LOCAL_APIC, %ebx
    movl $0, 0xb0(%rbx)           # end of interrupt
    pop %rbx
    iretq

print:
    mov $SERIAL, %edx
1:  lodsb
    test %al, %al
    jz 2f
    outb %al, (%dx)
    jmp 1b
2:  ret

    .data
said32: .asciz "payload: protected mode\n"
said64: .asciz "payload: long mode\n"
said_cpuid: .asciz "payload: cpuid\n"
said_ram: .asciz "payload: memory\n"
said_mmio: .asciz "payload: device registers\n"
said_timer: .asciz "payload: timer interrupt\n"
said_fail: .asciz "payload: FAILED after this\n"
    .balign 8
gdt: .quad 0, 0x00af9a000000ffff
gdt_pointer: .word 15
    .quad gdt
idt_pointer: .word 0x7f * 16 + 15
    .quad idt
ticks: .long 0

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
directories: .skip 4 * 4096
idt: .skip 128 * 16
    .skip 4096
stack:
