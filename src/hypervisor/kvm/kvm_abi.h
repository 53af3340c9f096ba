// <linux/kvm.h> as the kernel means it. Private to this folder: no other header includes it.
//
// Kernel headers before 6.5 declare trailing arrays through a macro that puts an empty struct in front; that
// is 0 bytes in C and 1 byte in C++, so structure sizes, and with them ioctl numbers, come out wrong. The
// macro is replaced by what the kernel's own later headers use for C++.
#pragma once

#include <linux/stddef.h>
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(T, N) T N[0]  // NOLINT

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#include <linux/kvm.h>
#pragma GCC diagnostic pop

static_assert(sizeof(kvm_cpuid2) == 8 && sizeof(kvm_cpuid_entry2) == 40);
static_assert(sizeof(kvm_msrs) == 8 && sizeof(kvm_msr_entry) == 16);
static_assert(sizeof(kvm_msr_list) == 4);
static_assert(sizeof(kvm_irq_routing) == 8 && sizeof(kvm_irq_routing_entry) == 48);
static_assert(sizeof(kvm_xsave) == 4096);
static_assert(sizeof(kvm_regs) == 144 && sizeof(kvm_sregs) == 312);
static_assert(sizeof(kvm_vcpu_events) == 64 && sizeof(kvm_debugregs) == 128);
static_assert(sizeof(kvm_lapic_state) == 1024 && sizeof(kvm_irqchip) == 520);
static_assert(sizeof(kvm_pit_state2) == 112 && sizeof(kvm_clock_data) == 48);
static_assert(sizeof(kvm_userspace_memory_region) == 32 && sizeof(kvm_dirty_log) == 16);
static_assert(sizeof(kvm_ioeventfd) == 64 && sizeof(kvm_irqfd) == 32);
static_assert(KVM_GET_SUPPORTED_CPUID == 0xc008ae05 && KVM_SET_CPUID2 == 0x4008ae90);
static_assert(KVM_GET_MSRS == 0xc008ae88 && KVM_SET_MSRS == 0x4008ae89);
static_assert(KVM_SET_GSI_ROUTING == 0x4008ae6a && KVM_GET_XSAVE == 0x9000aea4);
