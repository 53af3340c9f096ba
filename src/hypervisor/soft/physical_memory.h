// Guest physical memory of the software CPU: RAM and ROM by page, which pages hold code that was decoded or
// translated, and which were written.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "memory/address_space.h"

namespace wisp::soft {

inline constexpr std::uint64_t kPageSize = 4096;
inline constexpr std::uint64_t kPageOffset = kPageSize - 1;

// What is known of one page of RAM. All zero at first.
struct PageInfo {
  std::atomic<std::uint64_t> code_lines;  // 64-byte lines that hold instructions somebody keeps decoded
  std::atomic<std::uint32_t> version;     // grows when such a line is written
  std::atomic<std::uint32_t> dirty;       // written since the dirty log was last taken
  std::atomic<std::uint32_t> writes;      // since it holds code, or its code was last forgotten
  std::atomic<std::uint32_t> revoking;    // how many are taking the page's in-line write access away
};

// One page as found: `host` is null where there is no RAM or ROM.
struct PhysicalPage {
  std::uint8_t* host = nullptr;
  bool writable = false;
  PageInfo* info = nullptr;
  explicit operator bool() const { return host != nullptr; }
};

// Told of writes into lines that hold code, after they happened, by the thread that wrote.
class CodeWatcher {
 public:
  virtual ~CodeWatcher() = default;
  virtual void code_written(std::uint64_t gpa, std::uint32_t size) = 0;
  // The page's code is to be watched no longer: what was made of it ends, and its lines are cleared.
  virtual void forget_code(PageInfo& info, std::uint64_t gpa) = 0;
};

// Look-ups take no lock. Changes come from one control thread at a time.
class PhysicalMemory final : public AddressSpaceListener {
 public:
  PhysicalMemory();
  ~PhysicalMemory() override;
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  [[nodiscard]] PhysicalPage find(std::uint64_t gpa) const;

  // `changed` is called after each change of the map, and must return only when no processor uses what it
  // knew before.
  void set_change_hook(std::function<void()> changed) { changed_ = std::move(changed); }
  void set_code_watcher(CodeWatcher* watcher) { watcher_ = watcher; }

  // After a write of `size` bytes, inside one page, to RAM that may hold code or is watched for dirt.
  // Translated code does not call this: it has no write access to such pages (Mmu).
  void written(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size);

  // The same for any range, written by somebody who is no processor.
  void host_wrote(std::uint64_t gpa, std::uint64_t size);

  [[nodiscard]] bool dirty_log() const { return dirty_log_.load(std::memory_order_relaxed); }
  void set_dirty_log(bool on);
  // See Vm::take_dirty_log. Calls the change hook, so that later writes are seen again.
  [[nodiscard]] Result<std::vector<std::uint64_t>> take_dirty_log(std::uint64_t gpa);

  [[nodiscard]] bool has_doorbells() const;
  // The doorbell that a write hits, or -1.
  [[nodiscard]] int doorbell(std::uint64_t address, std::span<const std::uint8_t> data) const;

  [[nodiscard]] Result<void> range_added(const FlatRange& range) override;
  void range_removed(const FlatRange& range) override;

 private:
  struct Range {
    std::uint64_t gpa = 0;
    std::uint64_t size = 0;  // whole pages
    std::uint8_t* host = nullptr;
    bool writable = false;
    std::shared_ptr<PageInfo[]> info{};  // NOLINT(modernize-avoid-c-arrays)
  };
  struct Bell {
    std::uint64_t address = 0;
    std::uint32_t size = 0;
    std::optional<std::uint64_t> value{};
    int fd = -1;
  };
  struct Table {
    std::vector<Range> ranges{};
  };
  void publish(std::unique_ptr<Table> table);
  void forget_code(PageInfo& info, std::uint64_t gpa);

  std::atomic<const Table*> table_;
  std::vector<std::unique_ptr<const Table>> tables_;  // all that were published
  mutable std::mutex bell_mutex_;
  std::vector<Bell> bells_;
  std::function<void()> changed_;
  CodeWatcher* watcher_ = nullptr;
  std::atomic<bool> dirty_log_ = false;
};

}  // namespace wisp::soft
