// What the processors of one VM share about code: who must know when a page of it appears or changes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "hypervisor/soft/physical_memory.h"
#include "hypervisor/soft/processor.h"

namespace wisp::soft {

class Translator;

class SharedCode final : public CodeWatcher {
 public:
  SharedCode(PhysicalMemory& memory, SharedCodeHooks hooks, const ExecutionOptions& options);
  SharedCode(const SharedCode&) = delete;
  SharedCode& operator=(const SharedCode&) = delete;
  ~SharedCode() override;
  [[nodiscard]] Result<void> set_up();

  [[nodiscard]] const ExecutionOptions& options() const { return options_; }
  // Null where only the interpreter runs.
  [[nodiscard]] Translator* translator() { return translator_.get(); }

  // Instructions in [gpa, gpa + size), inside one page, are about to be read and kept decoded: from now on
  // every write to these lines changes the page's version. `cpu` and `mmu` are the caller's.
  void watch_code(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size, Cpu& cpu, Mmu& mmu);
  // The same for a page that is watched already, without telling anybody; false: it is not any more.
  [[nodiscard]] static bool watch_more(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size);
  // See SharedCodeHooks.
  void flush_inline(Cpu* self) { hooks_.flush_inline(self); }

  void code_written(std::uint64_t gpa, std::uint32_t size) override;
  void forget_code(PageInfo& info, std::uint64_t gpa) override;

 private:
  PhysicalMemory& memory_;
  const SharedCodeHooks hooks_;
  const ExecutionOptions options_;
  std::unique_ptr<Translator> translator_;
};

}  // namespace wisp::soft
