#include "hypervisor/soft/state_log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <span>

#include "hypervisor/xsave_layout.h"

namespace wisp::soft {
namespace {

// FNV-1a over words.
class Hash {
 public:
  void add(std::uint64_t word) { value_ = (value_ ^ word) * 0x100000001b3; }
  void add(std::span<const std::uint8_t> bytes) {
    for (const std::uint8_t byte : bytes) {
      add(byte);
    }
  }
  [[nodiscard]] std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace

Result<std::unique_ptr<StateLog>> StateLog::create(const std::string& path, std::uint64_t every,
                                                   std::uint64_t from) {
  UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file.valid()) {
    return fail_errno(errno, "-accel state-log={}: cannot write there", path);
  }
  return std::unique_ptr<StateLog>(new StateLog(std::move(file), every, from));
}

void StateLog::look(const Cpu& cpu) {
  const std::uint64_t retired = cpu.retired();
  if (retired < next_) {
    return;
  }
  next_ = retired + every_;
  Hash general;
  for (const std::uint64_t reg : std::array<std::uint64_t, 16>(cpu.gpr)) {
    general.add(reg);
  }
  Hash system;
  for (const std::uint64_t reg :
       {cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer, cpu.xcr0, cpu.msr.kernel_gs_base}) {
    system.add(reg);
  }
  for (const Segment& segment : cpu.segments) {
    system.add(segment.selector);
    system.add(segment.base);
  }
  Hash vectors;  // MXCSR, XMM and upper halves of YMM
  const std::span all(cpu.vectors);
  vectors.add(all.subspan(xsave::kMxcsr, 4));
  vectors.add(all.subspan(xsave::kXmm, xsave::kXmmEnd - xsave::kXmm));
  vectors.add(all.subspan(xsave::kYmm, xsave::kYmmSize));
  const std::string line =
      fmt::format("{} rip {:x} flags {:x} general {:016x} system {:016x} vectors {:016x}\n", retired, cpu.rip,
                  cpu.rflags(), general.value(), system.value(), vectors.value());
  // A disk that is full ends the log early, which the reader sees.
  (void)!::write(file_.get(), line.data(), line.size());
}

}  // namespace wisp::soft
