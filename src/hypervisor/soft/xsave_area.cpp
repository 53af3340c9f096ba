#include "hypervisor/soft/xsave_area.h"

#include <algorithm>

namespace wisp::soft {
namespace {

void clear(Cpu& cpu, std::uint32_t from, std::uint32_t end) {
  std::fill(cpu.vectors.begin() + from, cpu.vectors.begin() + end, std::uint8_t{0});
}

}  // namespace

void reset_xsave_area(Cpu& cpu) {
  cpu.vectors.fill(0);
  vectors_put<std::uint16_t>(cpu, xsave::kControl, 0x40);
  vectors_put<std::uint8_t>(cpu, xsave::kTag, 0xff);  // all hold +0.0
  vectors_put<std::uint32_t>(cpu, xsave::kMxcsr, xsave::kMxcsrInit);
  vectors_put<std::uint32_t>(cpu, xsave::kMxcsrMask, xsave::kMxcsrBits);
  vectors_put<std::uint64_t>(cpu, xsave::kHeader, xsave::kX87 | xsave::kSse);
}

void settle_xsave_area(Cpu& cpu) {
  auto present = vectors_get<std::uint64_t>(cpu, xsave::kHeader);
  if ((present & xsave::kX87) == 0) {
    clear(cpu, xsave::kControl, xsave::kMxcsr);
    clear(cpu, xsave::kStack, xsave::kStackEnd);
    vectors_put(cpu, xsave::kControl, xsave::kControlInit);
  }
  if ((present & xsave::kSse) == 0) {
    clear(cpu, xsave::kXmm, xsave::kXmmEnd);
  }
  present |= xsave::kX87 | xsave::kSse;
  // Without it in XCR0 the host may not have it either, and would refuse to load it.
  if ((cpu.xcr0 & xsave::kAvx) != 0) {
    if ((present & xsave::kAvx) == 0) {
      clear(cpu, xsave::kYmm, kXsaveSize);
    }
    present |= xsave::kAvx;
  }
  clear(cpu, xsave::kOpcode, xsave::kMxcsr);
  vectors_put(cpu, xsave::kMxcsrMask, xsave::kMxcsrBits);
  vectors_put(cpu, xsave::kHeader, present);
}

void put_x87_words(Cpu& cpu, std::uint16_t control, std::uint16_t status, std::uint8_t abridged_tag) {
  constexpr std::uint16_t kControlBits = 0x1f3f;
  constexpr std::uint16_t kControlFixed = 0x40;
  control = static_cast<std::uint16_t>((control & kControlBits) | kControlFixed);
  const bool pending = (status & ~control & xsave::kExceptions) != 0;
  status =
      static_cast<std::uint16_t>((status & ~xsave::kErrorSummary) | (pending ? xsave::kErrorSummary : 0));
  vectors_put(cpu, xsave::kControl, control);
  vectors_put(cpu, xsave::kStatus, status);
  vectors_put(cpu, xsave::kTag, abridged_tag);
}

}  // namespace wisp::soft
