#include "hypervisor/soft/shared_code.h"

#include "hypervisor/soft/mmu.h"
#include "hypervisor/soft/translator.h"

namespace wisp::soft {

SharedCode::SharedCode(PhysicalMemory& memory, SharedCodeHooks hooks, const ExecutionOptions& options)
    : memory_(memory), hooks_(std::move(hooks)), options_(options) {
  memory_.set_code_watcher(this);
}

SharedCode::~SharedCode() {
  memory_.set_code_watcher(nullptr);
}

Result<void> SharedCode::set_up() {
  if (options_.executor != ExecutorChoice::kInterpret && Translator::possible()) {
    WISP_ASSIGN(translator_, Translator::create(*this));
  }
  return {};
}

namespace {

// How often the others are asked about one page before the processor goes on with its instruction.
constexpr int kMostRounds = 2;

// A bit for each 64-byte line of the page that [gpa, gpa + size) touches.
std::uint64_t lines_of(std::uint64_t gpa, std::uint32_t size) {
  const std::uint64_t first = (gpa & kPageOffset) / 64;
  const std::uint64_t last = ((gpa & kPageOffset) + size - 1) / 64;
  return (~0ULL >> (63 - last)) & (~0ULL << first);
}

}  // namespace

bool SharedCode::watch_more(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size) {
  const std::uint64_t lines = lines_of(gpa, size);
  std::uint64_t before = page.info->code_lines.load(std::memory_order_seq_cst);
  do {
    if (before == 0 || page.info->revoking.load(std::memory_order_seq_cst) != 0) {
      return false;
    }
    if ((before & lines) == lines) {
      return true;
    }
  } while (!page.info->code_lines.compare_exchange_weak(before, before | lines, std::memory_order_seq_cst));
  return true;
}

void SharedCode::watch_code(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size, Cpu& cpu,
                            Mmu& mmu) {
  const std::uint64_t lines = lines_of(gpa, size);
  PageInfo& info = *page.info;
  std::uint32_t turns = 0;
  int rounds = 0;
  for (;;) {
    std::uint64_t before = info.code_lines.load(std::memory_order_seq_cst);
    if (before == 0) {
      // Somebody writes to it all the time. Whoever asked knows by the version that nothing is to be kept.
      if (++rounds > kMostRounds) {
        return;
      }
      // Nobody may write to the page in line any more.
      info.revoking.fetch_add(1, std::memory_order_seq_cst);
      if (info.code_lines.fetch_or(lines, std::memory_order_seq_cst) == 0) {
        mmu.revoke_write(page.host);
        hooks_.revoke_writes(&cpu);
      }
      info.revoking.fetch_sub(1, std::memory_order_seq_cst);
      continue;  // its code may have been forgotten meanwhile
    }
    if ((before & lines) != lines &&
        !info.code_lines.compare_exchange_weak(before, before | lines, std::memory_order_seq_cst)) {
      continue;
    }
    if (info.revoking.load(std::memory_order_seq_cst) == 0) {
      return;
    }
    // Who comes second waits for the first: were each to ask the others, two of them in one page could go on
    // asking for ever, an instruction at a time.
    hooks_.wait_a_turn(&cpu, turns);
  }
}

void SharedCode::forget_code(PageInfo& info, std::uint64_t gpa) {
  if (translator_) {
    translator_->forget_page(gpa, info.code_lines);
  } else {
    info.code_lines.store(0, std::memory_order_seq_cst);
  }
}

void SharedCode::code_written(std::uint64_t gpa, std::uint32_t size) {
  if (translator_) {
    translator_->code_written(gpa, size);
  }
}

Result<std::shared_ptr<SharedCode>> make_shared_code(PhysicalMemory& memory, SharedCodeHooks hooks,
                                                     const ExecutionOptions& options) {
  auto code = std::make_shared<SharedCode>(memory, std::move(hooks), options);
  WISP_TRY(code->set_up());
  return code;
}

}  // namespace wisp::soft
