#include "boot/start_info.h"

#include "base/bytes.h"
#include "base/checked.h"
#include "boot/layout.h"

namespace wisp {
namespace {

// A block of memory that is written at computed offsets.
class Block final {
 public:
  explicit Block(std::size_t size) : bytes_(size) {}
  template <std::integral T>
  void put(std::size_t offset, T value) {
    store_le(&bytes_[offset], value);
  }
  void put32(std::size_t offset, std::uint64_t value) { put(offset, static_cast<std::uint32_t>(value)); }
  [[nodiscard]] std::vector<std::uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<std::uint8_t> bytes_;
};

Result<void> check_space(std::size_t size, std::uint64_t space, std::size_t entries) {
  if (size > space) {
    return fail("a memory map of {} entries does not fit the boot information of {} bytes", entries, space);
  }
  return {};
}

}  // namespace

Result<std::vector<std::uint8_t>> build_pvh_start_info(Gpa gpa, std::uint64_t space, const BootInfo& info) {
  constexpr std::size_t kInfoSize = 56;
  constexpr std::size_t kModuleAt = 64;
  constexpr std::size_t kModuleSize = 32;
  constexpr std::size_t kMapAt = kModuleAt + kModuleSize;
  constexpr std::size_t kMapEntrySize = 24;
  static_assert(kInfoSize <= kModuleAt);

  const std::size_t size = kMapAt + info.e820.size() * kMapEntrySize;
  WISP_TRY(check_space(size, space, info.e820.size()));
  Block block(size);
  block.put32(0, 0x336E'C578);  // magic
  block.put32(4, 1);            // version
  block.put32(8, 0);            // flags
  block.put32(12, info.initrd ? 1 : 0);
  block.put<std::uint64_t>(16, info.initrd ? gpa + kModuleAt : 0);
  block.put<std::uint64_t>(24, info.command_line);
  block.put<std::uint64_t>(32, info.rsdp);
  block.put<std::uint64_t>(40, gpa + kMapAt);
  block.put32(48, info.e820.size());
  if (info.initrd) {
    block.put<std::uint64_t>(kModuleAt, info.initrd->gpa);
    block.put<std::uint64_t>(kModuleAt + 8, info.initrd->size);
  }
  std::size_t at = kMapAt;
  for (const E820Entry& entry : info.e820) {
    block.put<std::uint64_t>(at, entry.start);
    block.put<std::uint64_t>(at + 8, entry.size);
    block.put32(at + 16, static_cast<std::uint32_t>(entry.type));  // XEN_HVM_MEMMAP_TYPE_* are E820's
    at += kMapEntrySize;
  }
  return block.take();
}

Result<std::vector<std::uint8_t>> build_multiboot_info(Gpa gpa, std::uint64_t space, const BootInfo& info) {
  constexpr std::size_t kInfoSize = 120;
  constexpr std::size_t kModuleAt = kInfoSize;
  constexpr std::size_t kModuleSize = 16;
  constexpr std::size_t kNameAt = kModuleAt + kModuleSize;
  constexpr std::string_view kName = "wisp";
  constexpr std::size_t kMapAt = kNameAt + 8;
  constexpr std::size_t kMapEntrySize = 24;
  constexpr std::uint32_t kHasMemory = 1U << 0;
  constexpr std::uint32_t kHasCommandLine = 1U << 2;
  constexpr std::uint32_t kHasModules = 1U << 3;
  constexpr std::uint32_t kHasMap = 1U << 6;
  constexpr std::uint32_t kHasLoaderName = 1U << 9;

  const std::size_t size = kMapAt + info.e820.size() * kMapEntrySize;
  WISP_TRY(check_space(size, space, info.e820.size()));
  std::uint64_t upper = 0;  // bytes of RAM from 1 MiB on without a hole
  std::uint64_t lower = 0;  // bytes of RAM from 0 on
  for (const E820Entry& entry : info.e820) {
    if (entry.type == E820Type::kRam && entry.start == layout::kBiosEnd) {
      upper = entry.size;
    } else if (entry.type == E820Type::kRam && entry.start == 0) {
      lower = entry.size;
    }
  }
  Block block(size);
  block.put32(0, kHasMemory | kHasCommandLine | kHasMap | kHasLoaderName | (info.initrd ? kHasModules : 0U));
  block.put32(4, lower >> 10);
  block.put32(8, upper >> 10);
  block.put32(16, info.command_line);
  block.put32(20, info.initrd ? 1 : 0);
  block.put32(24, info.initrd ? gpa + kModuleAt : 0);
  block.put32(44, info.e820.size() * kMapEntrySize);
  block.put32(48, gpa + kMapAt);
  block.put32(64, gpa + kNameAt);
  if (info.initrd) {
    block.put32(kModuleAt, info.initrd->gpa);
    block.put32(kModuleAt + 4, info.initrd->gpa + info.initrd->size);
    block.put32(kModuleAt + 8, gpa + kNameAt + kName.size());  // an empty string
  }
  for (std::size_t i = 0; i < kName.size(); ++i) {
    block.put(kNameAt + i, static_cast<std::uint8_t>(kName[i]));
  }
  std::size_t at = kMapAt;
  for (const E820Entry& entry : info.e820) {
    block.put32(at, kMapEntrySize - 4);  // the size does not count itself
    block.put<std::uint64_t>(at + 4, entry.start);
    block.put<std::uint64_t>(at + 12, entry.size);
    block.put32(at + 20, static_cast<std::uint32_t>(entry.type));
    at += kMapEntrySize;
  }
  return block.take();
}

}  // namespace wisp
