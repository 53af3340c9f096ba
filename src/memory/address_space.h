// The tree of memory regions of one address space (memory or ports) and the flat view rendered from it.
//
// The tree is changed by one control thread at a time, by commit(), which renders a new flat view,
// tells the listeners what changed, and publishes the view. vCPUs look addresses up in the published view
// without a lock, through a Reader of their own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "memory/gpa.h"
#include "memory/io_handler.h"

namespace wisp {

enum class RegionKind : std::uint8_t {
  kContainer,  // has only children
  kRam,        // host memory, read and write
  kRom,        // host memory, guest writes are dropped
  kIo,         // answered by an IoHandler
  kAlias,      // shows a part of another region
};

// What a doorbell write looks like (KVM_IOEVENTFD): a write of `size` bytes at `offset` of the region, with
// `value` where given, signals `fd` in place of an exit. Size 0: a write of any size and value.
struct IoEvent {
  std::uint64_t offset = 0;
  std::uint32_t size = 0;
  std::optional<std::uint64_t> value{};
  int fd = -1;
  bool operator==(const IoEvent&) const = default;
};

class AddressSpace;
class MemoryRegion;
using MemoryRegionPtr = std::shared_ptr<MemoryRegion>;

// A node of the tree. Built by the factories; joined by AddressSpace::commit(), which checks it: size 0, an
// alias that shows more than its target has, or a loop of aliases are refused there. A region is the child of
// at most one container; aliases show it in other places. Only containers have children.
class MemoryRegion final {
 public:
  MemoryRegion(const MemoryRegion&) = delete;
  MemoryRegion& operator=(const MemoryRegion&) = delete;
  ~MemoryRegion();

  [[nodiscard]] static MemoryRegionPtr container(std::string name, std::uint64_t size);
  // `host` stays mapped as long as the region is in a tree, and until AddressSpace::quiescent() after that.
  [[nodiscard]] static MemoryRegionPtr ram(std::string name, std::uint8_t* host, std::uint64_t size);
  [[nodiscard]] static MemoryRegionPtr rom(std::string name, std::uint8_t* host, std::uint64_t size);
  [[nodiscard]] static MemoryRegionPtr io(std::string name, std::shared_ptr<IoHandler> handler,
                                          std::uint64_t size, std::vector<IoEvent> events = {});
  [[nodiscard]] static MemoryRegionPtr alias(std::string name, MemoryRegionPtr target,
                                             std::uint64_t target_offset, std::uint64_t size);

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] RegionKind kind() const { return kind_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }

 private:
  friend class AddressSpace;
  friend class FlatViewBuilder;
  MemoryRegion(std::string name, RegionKind kind, std::uint64_t size);

  struct Child {
    MemoryRegionPtr region{};
    std::uint64_t offset = 0;
    int priority = 0;
  };
  const std::string name_;
  const RegionKind kind_;
  const std::uint64_t size_;
  std::uint8_t* host_ = nullptr;
  std::shared_ptr<IoHandler> handler_;
  std::vector<IoEvent> events_;
  MemoryRegionPtr target_;
  std::uint64_t target_offset_ = 0;
  std::vector<Child> children_;  // the one that wins first
  MemoryRegion* parent_ = nullptr;
  const AddressSpace* root_of_ = nullptr;
};

// A maximal range of the address space that one region answers: neighbours that show adjacent bytes of the
// same region are one range.
struct FlatRange {
  Gpa start = 0;
  std::uint64_t size = 0;
  RegionKind kind = RegionKind::kIo;     // kRam, kRom or kIo
  std::uint8_t* host = nullptr;          // kRam, kRom: the host byte behind `start`
  std::shared_ptr<IoHandler> handler{};  // kIo
  std::uint64_t region_offset = 0;       // what `start` is in the region
  std::vector<IoEvent> events{};         // kIo: those inside the range; offsets are from `start`
  std::string name{};                    // of the region, for messages
  bool operator==(const FlatRange&) const = default;
};

// Sorted, without overlaps.
class FlatView final {
 public:
  FlatView() = default;
  explicit FlatView(std::vector<FlatRange> ranges) : ranges_(std::move(ranges)) {}
  [[nodiscard]] std::span<const FlatRange> ranges() const { return ranges_; }
  // The range that holds `address`, or null.
  [[nodiscard]] const FlatRange* find(Gpa address) const;

 private:
  std::vector<FlatRange> ranges_;
};

// Told of each change at commit, removals first, before the new view is published. An error ends the commit:
// the removals and additions told so far are told back, and the tree returns to what it was. Must not call
// the space it listens to.
class AddressSpaceListener {
 public:
  virtual ~AddressSpaceListener() = default;
  [[nodiscard]] virtual Result<void> range_added(const FlatRange& range) = 0;
  virtual void range_removed(const FlatRange& range) = 0;
};

class AddressSpace final {
 public:
  // `size` 0 means the whole 64-bit space.
  AddressSpace(std::string name, std::uint64_t size);
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;
  ~AddressSpace();

  struct Change {
    MemoryRegionPtr region{};
    MemoryRegionPtr parent{};  // null: the root
    std::uint64_t offset = 0;
    int priority = 0;  // higher wins; of equals the one added later wins
    bool add = true;
  };
  // Applies all changes in their order, or none. Errors: a child that does not fit, a region joined twice, a
  // removal of what is not there, a loop of aliases, a listener that refused. Thread-safe; may be called from
  // an IoHandler. A reader that began before may still be in a removed region's handler afterwards; the view
  // it holds keeps the handler alive.
  [[nodiscard]] Result<void> commit(std::span<const Change> changes);
  [[nodiscard]] Result<void> add(MemoryRegionPtr region, std::uint64_t offset, int priority = 0);
  [[nodiscard]] Result<void> remove(const MemoryRegionPtr& region);

  // Whether no reader holds an earlier view any more; frees those that none holds. After a removal and
  // `true`, nobody is in the removed region.
  [[nodiscard]] bool quiescent();

  // Tells the listener of everything that is there, then of each change. Borrowed; remove before it goes
  // (removing tells it nothing).
  [[nodiscard]] Result<void> add_listener(AddressSpaceListener* listener);
  void remove_listener(AddressSpaceListener* listener);

  // One look-up handle for one thread. Must not outlive the space.
  class Reader final {
   public:
    explicit Reader(AddressSpace& space);
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;
    ~Reader();
    // Read: fills `data`; write: hands it on, or signals the IoEvent that matches in its place (for engines
    // and tests without KVM_IOEVENTFD). An access that crosses ranges is split at the edges, and one of more
    // than 8 bytes into handler calls of at most 8; bytes that nobody answers read as ones, writes to them
    // and to ROM are dropped; nothing wraps at 2^64. Takes no lock and allocates nothing. A handler may use
    // the same reader again: it sees the view that the outer access began with.
    void read(Gpa address, std::span<std::uint8_t> data);
    void write(Gpa address, std::span<const std::uint8_t> data);

   private:
    friend class AddressSpace;
    struct Slot;
    class Hold;
    AddressSpace& space_;
    Slot* slot_;
  };

  // A copy of the present view, for listing and tests.
  [[nodiscard]] FlatView snapshot() const;

 private:
  struct Impl;
  struct Undo;
  [[nodiscard]] Result<void> apply(const Change& change, Undo& undo);
  [[nodiscard]] Result<void> apply_addition(const Change& change, Undo& undo);
  [[nodiscard]] Result<void> apply_removal(const Change& change, Undo& undo);
  static void roll_back(Undo& undo);
  [[nodiscard]] bool foreign(const MemoryRegion& region) const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace wisp
