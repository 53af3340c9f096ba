// What devices and boot code see of guest RAM: checked windows, never plain references.
//
// Guest RAM changes under the reader's feet (other vCPUs write it at any time): copy a value in once, then
// judge the copy.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "memory/gpa.h"

namespace wisp {

// A window on guest RAM whose bounds were checked when it was made; the only way to reach guest bytes.
// Host memory behind it stays mapped as long as the GuestMemory it came from lives.
class GuestSlice final {
 public:
  GuestSlice() = default;
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] Gpa gpa() const { return gpa_; }

  // Copies min(out.size(), size() - offset) bytes, each guest byte once; returns how many. An aligned number
  // of 2, 4 or 8 bytes is copied whole, never torn. write() does not mark pages dirty:
  // GuestMemory::mark_dirty does.
  std::size_t read(std::size_t offset, std::span<std::uint8_t> out) const;
  std::size_t write(std::size_t offset, std::span<const std::uint8_t> in) const;

  // The part [offset, offset + size), where it lies inside.
  [[nodiscard]] std::optional<GuestSlice> part(std::size_t offset, std::size_t size) const;
  // For system calls (readv, writev, io_uring) and for handing to vhost: never dereferenced here.
  [[nodiscard]] iovec as_iovec() const { return {data_, size_}; }

 private:
  friend class GuestMemory;
  GuestSlice(std::uint8_t* data, std::size_t size, Gpa gpa) : data_(data), size_(size), gpa_(gpa) {}
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  Gpa gpa_ = 0;
};

// Which 4 KiB pages were written since the last take(). Thread-safe and lock-free.
class DirtyBitmap final {
 public:
  explicit DirtyBitmap(std::uint64_t bytes);
  // `offset` and `size` are in bytes from the start of the block and must lie inside it.
  void mark(std::uint64_t offset, std::uint64_t size);
  // One bit per page, least significant first; clears what it returns.
  [[nodiscard]] std::vector<std::uint64_t> take();

 private:
  std::vector<std::atomic<std::uint64_t>> words_;
};

// One piece of RAM at one guest address. The host mapping belongs to a RamBlock (ram.h) that outlives this.
struct GuestMemoryBlock {
  Gpa gpa = 0;
  std::uint64_t size = 0;        // bytes, a multiple of the page size
  std::uint8_t* host = nullptr;  // start of the mapping
  int fd = -1;  // shared memfd or file behind it (borrowed), by which others see the same bytes; else -1
  std::uint64_t fd_offset = 0;           // where in that file the block starts
  std::shared_ptr<DirtyBitmap> dirty{};  // null where writes by devices are not tracked
};

// All guest RAM of one machine. Look-up is lock-free; blocks are added by one control thread and never go
// away before the machine does (unplugged memory is taken out of the table, its host mapping stays reserved).
class GuestMemory final {
 public:
  GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;
  ~GuestMemory();

  // Publishes a new table. Blocks must not overlap. Readers see either the old table or the new one.
  void set_blocks(std::vector<GuestMemoryBlock> blocks);
  // Sorted by address. The span is valid as long as this object.
  [[nodiscard]] std::span<const GuestMemoryBlock> blocks() const;

  // The window [gpa, gpa + size), where all of it lies in one block; nothing for size 0.
  [[nodiscard]] std::optional<GuestSlice> slice(Gpa gpa, std::uint64_t size) const;
  // Whole-buffer copies; false, with nothing or a part copied, where any byte is not RAM. May cross blocks
  // that touch.
  [[nodiscard]] bool read(Gpa gpa, std::span<std::uint8_t> out) const;
  // Marks what it wrote as dirty.
  [[nodiscard]] bool write(Gpa gpa, std::span<const std::uint8_t> in) const;
  // One naturally aligned or unaligned number, read once.
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  [[nodiscard]] std::optional<T> load(Gpa gpa) const {
    T value{};
    const std::span bytes(reinterpret_cast<std::uint8_t*>(&value), sizeof value);
    return read(gpa, bytes) ? std::optional<T>(value) : std::nullopt;
  }
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  [[nodiscard]] bool store(Gpa gpa, const T& value) const {
    return write(gpa, std::span(reinterpret_cast<const std::uint8_t*>(&value), sizeof value));
  }

  // Called with every range that is written through this object or told to mark_dirty(), after it was. To be
  // set before there are others that write.
  void set_write_hook(std::function<void(Gpa, std::uint64_t)> hook) { write_hook_ = std::move(hook); }

  // Tells that [gpa, gpa + size) was written behind this class's back (by a system call). Ignores what is not
  // RAM.
  void mark_dirty(Gpa gpa, std::uint64_t size) const;

 private:
  struct Table;
  [[nodiscard]] const GuestMemoryBlock* find(Gpa gpa) const;
  std::atomic<const Table*> table_;
  std::vector<std::unique_ptr<const Table>> tables_;  // all that were ever published
  std::function<void(Gpa, std::uint64_t)> write_hook_;
};

}  // namespace wisp
