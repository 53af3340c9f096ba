// How RamBlock gets its mapping from the host: files, huge pages, placement and population.
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/unique_fd.h"
#include "memory/ram.h"

namespace wisp {

// What stands behind the memory, before it is mapped.
struct RamStore {
  UniqueFd fd;          // -1: anonymous
  FreshFile created{};  // the file, where it was not there before: to be kept when all has gone well
  bool shared = false;  // MAP_SHARED
  std::uint64_t page_size = 0;
};

// Opens or creates the file, checks the options against it and makes it `options.size` long.
[[nodiscard]] Result<RamStore> open_ram_store(const RamOptions& options);

// Maps it, readable and writable, at an address that is a multiple of 2 MiB where the size allows (so that
// huge pages can back guest and host alike).
[[nodiscard]] Result<std::uint8_t*> map_ram(const RamStore& store, std::uint64_t size, bool prealloc);

// Takes every page from the host now.
[[nodiscard]] Result<void> populate_ram(std::uint8_t* host, std::uint64_t size, std::uint64_t page_size);

// "2 MiB", "4 KiB", "123 bytes".
[[nodiscard]] std::string size_text(std::uint64_t bytes);

}  // namespace wisp
