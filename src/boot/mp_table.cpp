#include "boot/mp_table.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <string_view>

#include "boot/layout.h"

namespace wisp {
namespace {

class Writer final {
 public:
  void u8(std::uint32_t value) { bytes_.push_back(static_cast<std::uint8_t>(value)); }
  void u16(std::uint32_t value) {
    u8(value & 0xFF);
    u8(value >> 8 & 0xFF);
  }
  void u32(std::uint64_t value) {
    u16(static_cast<std::uint32_t>(value & 0xFFFF));
    u16(static_cast<std::uint32_t>(value >> 16 & 0xFFFF));
  }
  void text(std::string_view value) {
    for (const char c : value) {
      bytes_.push_back(static_cast<std::uint8_t>(c));
    }
  }
  [[nodiscard]] std::vector<std::uint8_t>& bytes() { return bytes_; }

 private:
  std::vector<std::uint8_t> bytes_;
};

// Makes the bytes sum to zero by way of the one at `at`.
void set_checksum(std::span<std::uint8_t> bytes, std::size_t at) {
  bytes[at] = 0;
  bytes[at] = static_cast<std::uint8_t>(0x100 - (std::accumulate(bytes.begin(), bytes.end(), 0U) & 0xFF));
}

// Entry types of section 4.3.
enum Entry : std::uint8_t {
  kProcessor = 0,
  kBus = 1,
  kIoApicEntry = 2,
  kIoInterrupt = 3,
  kLocalInterrupt = 4
};
// Interrupt types of table 4-11.
enum Interrupt : std::uint8_t { kInt = 0, kNmi = 1, kExtInt = 3 };

constexpr std::uint32_t kPointerSize = 16;
constexpr std::uint32_t kApicVersion = 0x14;    // integrated local APIC
constexpr std::uint32_t kIoApicVersion = 0x11;  // 82093AA
constexpr std::uint32_t kCpuSignature = 0x600;  // family 6
constexpr std::uint32_t kCpuFeatures = 0x201;   // FPU, APIC on chip
constexpr std::uint32_t kIsaBus = 0;

}  // namespace

std::vector<std::uint8_t> build_mp_table(Gpa gpa, std::uint32_t cpus, const CpuTopology& topology) {
  std::uint32_t count = std::min(cpus, kMpMaxCpus);
  while (count > 1 && apic_id_of(topology, count - 1) >= kMpMaxCpus) {
    --count;
  }
  const std::uint32_t io_apic_id = apic_id_of(topology, count - 1) + 1;

  Writer table;  // section 4.2
  table.text("PCMP");
  table.u16(0);  // length
  table.u8(4);   // specification revision 1.4
  table.u8(0);   // checksum
  table.text("WISP    ");
  table.text("MICROVM     ");
  table.u32(0);  // OEM table
  table.u16(0);
  table.u16(0);  // entries
  table.u32(layout::kLocalApic);
  table.u16(0);  // extended table
  table.u8(0);
  table.u8(0);

  for (std::uint32_t cpu = 0; cpu < count; ++cpu) {
    table.u8(kProcessor);
    table.u8(apic_id_of(topology, cpu));
    table.u8(kApicVersion);
    table.u8(cpu == 0 ? 3 : 1);  // enabled; bit 1: boot processor
    table.u32(kCpuSignature);
    table.u32(kCpuFeatures);
    table.u32(0);
    table.u32(0);
  }
  table.u8(kBus);
  table.u8(kIsaBus);
  table.text("ISA   ");
  table.u8(kIoApicEntry);
  table.u8(io_apic_id);
  table.u8(kIoApicVersion);
  table.u8(1);  // enabled
  table.u32(layout::kIoApic);
  for (std::uint32_t pin = 0; pin < kIoApicPins; ++pin) {
    table.u8(kIoInterrupt);
    table.u8(kInt);
    table.u16(0);  // polarity and trigger as usual on ISA: active high, edge
    table.u8(kIsaBus);
    table.u8(pin);
    table.u8(io_apic_id);
    table.u8(pin);
  }
  for (const auto& [type, apic, pin] : {std::array<std::uint32_t, 3>{kExtInt, 0, 0}, {kNmi, 0xFF, 1}}) {
    table.u8(kLocalInterrupt);
    table.u8(type);
    table.u16(0);
    table.u8(kIsaBus);
    table.u8(0);
    table.u8(apic);
    table.u8(pin);
  }
  std::vector<std::uint8_t>& config = table.bytes();
  const std::size_t entries = count + 1 + 1 + kIoApicPins + 2;
  config[4] = static_cast<std::uint8_t>(config.size());
  config[5] = static_cast<std::uint8_t>(config.size() >> 8);
  config[34] = static_cast<std::uint8_t>(entries);
  config[35] = static_cast<std::uint8_t>(entries >> 8);
  set_checksum(config, 7);

  Writer pointer;  // section 4.1
  pointer.text("_MP_");
  pointer.u32(gpa + kPointerSize);
  pointer.u8(1);  // length in paragraphs
  pointer.u8(4);
  pointer.u8(0);  // checksum
  pointer.u8(0);  // a configuration table is there
  pointer.u8(0);  // virtual wire mode, no IMCR
  pointer.u8(0);
  pointer.u16(0);
  set_checksum(pointer.bytes(), 10);

  std::vector<std::uint8_t> out = std::move(pointer.bytes());
  out.insert(out.end(), config.begin(), config.end());
  return out;
}

}  // namespace wisp
