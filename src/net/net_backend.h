// Where a network device's frames go to and come from.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/error.h"
#include "net/frame.h"

namespace wisp {

// Work on frames that one side may leave to the other.
struct NetOffloads {
  bool checksum = false;  // transport checksums are incomplete, the header says where they go
  bool tso4 = false;      // TCP over IPv4 in segments of up to 64 KiB
  bool tso6 = false;      // the same over IPv6
  bool ecn = false;       // such segments with ECN bits
  bool ufo = false;       // UDP in fragments of up to 64 KiB
  bool operator==(const NetOffloads&) const = default;
};

enum class NetIo : std::uint8_t {
  kDone,     // the frame went through
  kAgain,    // nothing happened: wait until poll_fd() is ready, then try again
  kDropped,  // the outside refused this frame; go on with the next
  kClosed,   // the peer is gone and will not come back: the link is down
};

struct NetReceived {
  NetIo status = NetIo::kAgain;
  std::size_t size = 0;  // of the frame with its header, where kDone
};

// A peer for Ethernet frames with one or more pairs of queues. Nothing here blocks. Not thread-safe: all
// calls are made under the lock of the one device that uses it.
class NetBackend {
 public:
  NetBackend() = default;
  NetBackend(const NetBackend&) = delete;
  NetBackend& operator=(const NetBackend&) = delete;
  virtual ~NetBackend() = default;

  [[nodiscard]] virtual std::uint16_t queue_pairs() const { return 1; }

  // Whether frames carry a virtio-net header of kVnetHeaderSize bytes in front, both ways.
  [[nodiscard]] virtual bool has_vnet_header() const { return false; }
  // What set_offloads() can turn on; frames that are sent may use the same. All false without the header.
  [[nodiscard]] virtual NetOffloads offloads() const { return {}; }
  // What received frames may leave to the receiver from now on.
  [[nodiscard]] virtual Result<void> set_offloads(const NetOffloads& offloads);
  // Spreads received frames over the first `pairs` queue pairs only; 1..queue_pairs(). All are active at
  // birth.
  [[nodiscard]] virtual Result<void> set_active_pairs(std::uint16_t pairs);

  // Sends one frame, with its header where has_vnet_header(). At most kMaxFrameIovecs pieces. A frame taken
  // with kDone may wait in a bounded buffer until flush().
  [[nodiscard]] virtual NetIo send(std::uint16_t pair, std::span<const iovec> frame) = 0;
  // Pushes out what send() kept, at the end of a batch. kAgain: call again when poll_fd() is writable.
  [[nodiscard]] virtual NetIo flush(std::uint16_t /*pair*/) { return NetIo::kDone; }

  // Receives one frame into the buffers, with its header where has_vnet_header(). A frame that is longer
  // loses its end; `size` tells at most the buffers' size then. kAgain means that nothing waits, neither in
  // the descriptor nor in a buffer here: only then does it help to wait for poll_fd().
  [[nodiscard]] virtual NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) = 0;

  // Readable when frames came, writable when there is room for some. Stays open as long as the back end, but
  // must not be watched any more after kClosed (it would be ready for ever).
  [[nodiscard]] virtual int poll_fd(std::uint16_t pair) const = 0;
  // A descriptor that the kernel's vhost-net can take as its back end; -1 where there is none.
  [[nodiscard]] virtual int vhost_backend_fd(std::uint16_t /*pair*/) const { return -1; }

  // "tap tap0", "passt (pid 17)", ...
  [[nodiscard]] virtual std::string description() const = 0;
  // Why the last call gave kClosed, in one line.
  [[nodiscard]] virtual std::string failure() { return "the peer closed the connection"; }
};

}  // namespace wisp
