// One receive and one transmit queue of a network device, served in user space (virtio 1.2, 5.1.6).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/event_loop.h"
#include "net/net_backend.h"
#include "virtio/device.h"
#include "virtio/queue.h"

namespace wisp {

// The header in front of each frame (5.1.6), little-endian.
struct VirtioNetHeader {
  std::uint8_t flags = 0;
  std::uint8_t gso_type = 0;
  std::uint16_t header_length = 0;
  std::uint16_t gso_size = 0;
  std::uint16_t checksum_start = 0;
  std::uint16_t checksum_offset = 0;
  std::uint16_t buffer_count = 0;
};
static_assert(sizeof(VirtioNetHeader) == kVnetHeaderSize);

inline constexpr std::uint8_t kNetHeaderNeedsChecksum = 1;
inline constexpr std::uint8_t kNetGsoNone = 0;
inline constexpr std::uint8_t kNetGsoTcp4 = 1;
inline constexpr std::uint8_t kNetGsoUdp = 3;
inline constexpr std::uint8_t kNetGsoTcp6 = 4;
inline constexpr std::uint8_t kNetGsoEcn = 0x80;

struct NetCounters {
  std::uint64_t rx_frames = 0;
  std::uint64_t rx_bytes = 0;
  std::uint64_t rx_dropped = 0;  // too short, or longer than the driver's buffers
  std::uint64_t tx_frames = 0;
  std::uint64_t tx_bytes = 0;
  std::uint64_t tx_dropped = 0;  // malformed, or refused by the back end
};

// What a pair tells its device. Called under the device's lock.
class NetPairOwner {
 public:
  virtual ~NetPairOwner() = default;
  // The back end is gone for good.
  virtual void backend_closed() = 0;
  // The driver broke the rules of a queue.
  virtual void queue_broken(std::uint16_t queue) = 0;
};

class NetQueuePair final {
 public:
  // What of the transmit header the driver may use.
  struct Negotiated {
    bool mergeable = false;
    NetOffloads transmit;
  };
  // All references outlive this object.
  NetQueuePair(NetPairOwner& owner, Strand& strand, NetBackend& backend, NetCounters& counters,
               std::uint16_t pair)
      : owner_(owner), strand_(strand), backend_(backend), counters_(counters), pair_(pair) {}
  NetQueuePair(const NetQueuePair&) = delete;
  NetQueuePair& operator=(const NetQueuePair&) = delete;
  ~NetQueuePair() = default;

  // Takes the queues (either may be unset) with their kick eventfds.
  [[nodiscard]] Result<void> start(std::optional<Queue> rx, std::optional<Queue> tx, int rx_kick, int tx_kick,
                                   VirtioInterrupts& interrupts, const Negotiated& negotiated);
  // Ends all; the queues are gone.
  void stop();
  // Whether frames are received on this pair (the driver chose how many pairs it uses).
  void set_receiving(bool on);
  // Without a link nothing is received, and what the driver sends is dropped.
  void set_link(bool up);
  void hold();    // stills everything, nothing is in flight afterwards
  void unhold();  // takes it up again; process_rx() and process_tx() must follow

  void process_rx();
  void process_tx();
  [[nodiscard]] const Queue* rx() const { return rx_ ? &*rx_ : nullptr; }
  [[nodiscard]] const Queue* tx() const { return tx_ ? &*tx_ : nullptr; }

 private:
  enum class Step : std::uint8_t {
    kFrame,    // one frame (or unusable buffer) was handled
    kIdle,     // nothing came
    kStalled,  // the driver has no (or too few) buffers
    kOver,     // the queue is broken or the back end gone
  };
  [[nodiscard]] Step receive_one();
  [[nodiscard]] Step deliver_held();
  // Pops chains until they hold `size` bytes or there are no more.
  [[nodiscard]] bool prefetch(std::size_t size);
  [[nodiscard]] bool pop_one();
  void write_scattered(std::size_t offset, std::span<const std::uint8_t> bytes);
  void push_frame(std::size_t size);
  void give_back();
  [[nodiscard]] NetIo transmit(const DescriptorChain& chain);
  void closed();
  void broken(bool rx);
  void on_ready(std::uint32_t events);
  void update_watch();
  [[nodiscard]] std::uint8_t* buffer();

  // A header and the longest frame.
  static constexpr std::size_t kBufferSize = kVnetHeaderSize + kMaxFrameSize;

  NetPairOwner& owner_;
  Strand& strand_;
  NetBackend& backend_;
  NetCounters& counters_;
  const std::uint16_t pair_;
  std::optional<Queue> rx_;
  std::optional<Queue> tx_;
  int rx_kick_ = -1;
  int tx_kick_ = -1;
  VirtioInterrupts* interrupts_ = nullptr;
  Negotiated negotiated_;
  bool receiving_ = false;
  bool link_up_ = true;
  bool held_still_ = false;
  bool closed_ = false;
  bool rx_stalled_ = false;
  bool tx_blocked_ = false;
  Watch watch_;
  std::uint32_t watched_events_ = 0;

  // Receiving: chains_[0, chain_count_) are popped and not yet used, with rx_capacity_ bytes in all.
  std::vector<DescriptorChain> chains_;
  std::size_t chain_count_ = 0;
  std::size_t rx_capacity_ = 0;
  std::size_t rx_target_ = 0;
  bool discarded_ = false;  // the last prefetch() gave an unusable chain back
  // A frame (with its header, in buffer_) that waits for buffers of the driver; 0: none.
  std::size_t held_size_ = 0;
  std::optional<Timer> held_timer_;

  DescriptorChain tx_chain_;
  std::vector<iovec> iovecs_;
  std::unique_ptr<std::uint8_t[]> buffer_;  // receiving, kBufferSize, made when first needed
  std::unique_ptr<std::uint8_t[]> tx_buffer_;
};

}  // namespace wisp
