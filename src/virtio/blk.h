// The block device (virtio 1.2, section 5.2).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/property.h"
#include "block/block_backend.h"
#include "virtio/device.h"

namespace wisp {

struct VirtioBlkOptions {
  std::string id{};
  std::string drive{};   // id of the drive behind it
  std::string serial{};  // what GET_ID answers, at most 20 bytes
  std::uint16_t num_queues = 1;
  std::uint16_t queue_size = 256;
};

inline constexpr std::uint16_t kVirtioBlkMaxQueues = 16;

// The options of virtio-blk-device, without `id`.
[[nodiscard]] std::span<const PropertySpec> virtio_blk_properties();
[[nodiscard]] Result<VirtioBlkOptions> virtio_blk_options(const std::string& id,
                                                          const PropertySet& properties);

// All queues run on the device's strand. At most kRequestsInFlight requests (over all queues) are with the
// back end; more wait in their rings.
class VirtioBlk final : public VirtioDevice, private BlockClient {
 public:
  // Attaches itself to the back end (borrowed, and outliving the device) until it is destroyed. Fails where
  // another device has the back end. Destroyed without the strand's lock held.
  [[nodiscard]] static Result<std::unique_ptr<VirtioBlk>> create(EventLoop& loop, const GuestMemory& memory,
                                                                 const VirtioBlkOptions& options,
                                                                 BlockBackend& backend, Log& log,
                                                                 const Clock& clock);
  ~VirtioBlk() override;

  static constexpr std::uint32_t kRequestsInFlight = 128;

  [[nodiscard]] std::string_view name() const override { return "virtio-blk"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 2; }
  [[nodiscard]] std::uint64_t features() const override;
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return queue_sizes_; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

  [[nodiscard]] const VirtioBlkOptions& options() const { return options_; }
  // Since the start, resets included. With the strand's lock held.
  [[nodiscard]] const BlockCounters& counters() const { return counters_; }

 protected:
  void on_pause() override;

 private:
  // A range of discard or write zeroes, in bytes.
  struct Segment {
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    bool unmap = false;
  };
  static constexpr std::size_t kMaxSegments = 8;
  // A chain on its way. Reused, so that the steady state allocates nothing.
  struct Request final : BlockRequest {
    DescriptorChain chain;
    std::vector<iovec> iovecs;
    std::uint16_t queue = 0;
    std::size_t data_read = 0;  // bytes from the start of the writable part that hold data
    std::array<Segment, kMaxSegments> segments;
    std::size_t segment_count = 0;
    std::size_t next_segment = 0;
  };
  struct QueueState {
    std::optional<Queue> queue;
    int kick_fd = -1;
    std::vector<Request*> free;
    bool used = false;     // chains were returned since the driver was last told
    bool starved = false;  // no free request: look again when one is returned
  };

  VirtioBlk(EventLoop& loop, const GuestMemory& memory, const VirtioBlkOptions& options,
            BlockBackend& backend, Log& log, const Clock& clock);
  void process(std::uint16_t index);
  void begin(Request& request);
  void begin_transfer(Request& request, bool read, std::uint64_t sector);
  void begin_ranges(Request& request, BlockOp op);
  void begin_get_id(Request& request);
  [[nodiscard]] std::uint8_t read_segments(Request& request, BlockOp op);
  // Gives the next range to the back end; false where there is none left.
  bool submit_next_range(Request& request);
  void count(const BlockRequest& request, int error);
  void complete(Request& request, std::uint8_t status);
  void give_back(Request& request);
  void tell_driver();
  void break_device(std::string_view what);
  void block_done(BlockRequest& block_request, int error) override;
  void block_batch_done() override;

  const VirtioBlkOptions options_;
  BlockBackend& backend_;
  Log& log_;
  LogGate gate_;
  const std::vector<std::uint16_t> queue_sizes_;

  bool writeback_ = true;  // the driver's choice (CONFIG_WCE)
  std::uint64_t features_ = 0;
  VirtioInterrupts* interrupts_ = nullptr;  // null: not active
  std::vector<QueueState> queues_;
  std::vector<Request> requests_;
  BlockCounters counters_;
  bool attached_ = false;
  bool broken_ = false;
  bool resetting_ = false;
  bool resubmitted_ = false;  // from within block_done()
};

}  // namespace wisp
