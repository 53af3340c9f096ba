// A bare guest for tests of engines: some RAM at address 0 and a few ways to start a vCPU in it.
//
// Guest programs are bytes with the instructions beside them. They keep to plain instructions, since a KVM
// that interprets ring 0 in software must run them too.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "hypervisor/hypervisor.h"
#include "memory/guest_memory.h"

namespace wisp {

// Unwraps a Result or ends the test program with its error.
template <typename T>
T must(Result<T> result) {
  if (!result) {
    ADD_FAILURE() << result.error().message;
    std::abort();
  }
  if constexpr (!std::is_void_v<T>) {
    return *std::move(result);
  }
}

// Zeroed, page-aligned host memory.
class HostPages final {
 public:
  explicit HostPages(std::size_t size)
      : size_(size),
        bytes_(static_cast<std::uint8_t*>(
            ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (static_cast<void*>(bytes_) == MAP_FAILED) {
      std::abort();
    }
  }
  HostPages(HostPages&& other) noexcept : size_(other.size_), bytes_(std::exchange(other.bytes_, nullptr)) {}
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;
  ~HostPages() {
    if (bytes_ != nullptr) {
      ::munmap(bytes_, size_);
    }
  }
  [[nodiscard]] std::uint8_t* data() const { return bytes_; }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  std::size_t size_;
  std::uint8_t* bytes_;
};

class BareGuest {
 public:
  static constexpr std::uint64_t kRamSize = 1 << 20;

  BareGuest(std::unique_ptr<Hypervisor> hypervisor, const VmOptions& options = {}, bool with_ram = true)
      : hypervisor_(std::move(hypervisor)), vm_(must(hypervisor_->create_vm(options))), ram_(kRamSize) {
    if (with_ram) {
      must(vm_->memory_listener().range_added(ram_range()));
      memory_.set_blocks({{.gpa = 0, .size = kRamSize, .host = ram_.data()}});
    }
    for (std::uint32_t i = 0; i < options.max_vcpus; ++i) {
      vcpus_.push_back(must(vm_->create_vcpu(i)));
    }
  }
  [[nodiscard]] FlatRange ram_range() const {
    return {.start = 0, .size = kRamSize, .kind = RegionKind::kRam, .host = ram_.data(), .name = "ram"};
  }
  [[nodiscard]] Hypervisor& hypervisor() { return *hypervisor_; }
  [[nodiscard]] Vm& vm() { return *vm_; }
  [[nodiscard]] Vcpu& vcpu(std::size_t index = 0) { return *vcpus_.at(index); }
  // Its RAM, where it was made with some.
  [[nodiscard]] const GuestMemory& memory() const { return memory_; }
  [[nodiscard]] std::uint8_t* at(Gpa gpa) const { return ram_.data() + gpa; }
  void put(Gpa gpa, std::initializer_list<std::uint8_t> bytes) { std::ranges::copy(bytes, at(gpa)); }

  // All start at `entry` with interrupts off, flat segments from 0 and a stack below `entry`.
  void start_real(Gpa entry) {
    CpuSpecialRegs sregs = must(vcpu().special_regs());
    for (CpuSegment* segment : {&sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss}) {
      segment->base = 0;
      segment->selector = 0;
    }
    start(sregs, entry);
  }
  void start_protected(Gpa entry) {
    CpuSpecialRegs sregs = flat(must(vcpu().special_regs()));
    sregs.cr0 = 0x11;
    start(sregs, entry);
  }
  // The first 4 GiB are mapped to themselves by 2 MiB pages; the tables take 0x90000 to 0x96000.
  void start_long(Gpa entry) {
    CpuSpecialRegs sregs = flat(must(vcpu().special_regs()));
    sregs.cs.default_big = false;
    sregs.cs.long_mode = true;
    sregs.cr0 = 0x80000011;
    sregs.cr3 = 0x90000;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    store_le<std::uint64_t>(at(0x90000), 0x91000 | 3);
    for (std::uint64_t gib = 0; gib < 4; ++gib) {
      const std::uint64_t directory = 0x92000 + gib * 0x1000;
      store_le<std::uint64_t>(at(0x91000 + gib * 8), directory | 3);
      for (std::uint64_t i = 0; i < 512; ++i) {
        store_le<std::uint64_t>(at(directory + i * 8), ((gib << 30) + (i << 21)) | 0x83);
      }
    }
    start(sregs, entry);
  }

  // Runs until an exit that is not an interruption.
  [[nodiscard]] Exit run() {
    for (;;) {
      Exit exit = vcpu().run();
      if (!std::holds_alternative<InterruptedExit>(exit)) {
        return exit;
      }
    }
  }
  // Takes in a pending access.
  void complete() {
    vcpu().kick();
    const Exit exit = vcpu().run();
    ASSERT_TRUE(std::holds_alternative<InterruptedExit>(exit)) << exit.index();
  }

 private:
  static CpuSpecialRegs flat(CpuSpecialRegs sregs) {
    const CpuSegment data{.limit = UINT32_MAX,
                          .selector = 0x10,
                          .type = 3,
                          .present = true,
                          .default_big = true,
                          .granularity = true};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cs = data;
    sregs.cs.selector = 8;
    sregs.cs.type = 11;
    return sregs;
  }
  void start(const CpuSpecialRegs& sregs, Gpa entry) {
    must(vcpu().set_special_regs(sregs));
    CpuRegs regs;
    regs.rip = entry;
    regs.rsp = entry;
    must(vcpu().set_regs(regs));
  }

  std::unique_ptr<Hypervisor> hypervisor_;
  std::unique_ptr<Vm> vm_;
  HostPages ram_;
  GuestMemory memory_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
};

// The value of a port write of the given shape, for comparisons.
struct PortWrite {
  std::uint16_t port = 0;
  std::size_t size = 0;
  std::uint64_t value = 0;
  bool operator==(const PortWrite&) const = default;
};

inline PortWrite port_write_of(const Exit& exit) {
  const auto* write = std::get_if<PortWriteExit>(&exit);
  if (write == nullptr) {
    const auto* error = std::get_if<EngineErrorExit>(&exit);
    ADD_FAILURE() << "exit of kind " << exit.index() << " in place of a port write "
                  << (error != nullptr ? error->message : "");
    return {};
  }
  return {write->port, write->data.size(), bytes_to_u64(write->data)};
}

}  // namespace wisp
