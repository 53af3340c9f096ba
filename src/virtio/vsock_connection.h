// One stream between a guest port and a Unix socket of the host: its state, credit and buffer. Pure book
// keeping and socket calls; who sends what when is VsockMux's business.
#pragma once

#include <sys/uio.h>
#include <sys/un.h>

#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "virtio/vsock_packet.h"

namespace wisp {

// Unix stream sockets, non-blocking and close-on-exec. The path fits a socket address.
[[nodiscard]] Result<UniqueFd> make_unix_socket();
[[nodiscard]] sockaddr_un unix_address(const std::string& path);
// 0 or an errno value.
[[nodiscard]] int connect_unix_socket(int fd, const std::string& path);

class VsockConnection final {
 public:
  enum class State : std::uint8_t {
    kRequested,    // the host wants to connect; the guest has not answered yet
    kEstablished,  // data flows
    kClosing,      // we said that nothing goes either way; the guest's RST is awaited
    kDraining,     // the guest is done with it; what it wrote still goes to a slow peer
  };
  // What it has to tell the guest.
  enum Pending : std::uint32_t {
    kSendRequest = 1,
    kSendResponse = 2,
    kSendShutdown = 4,
    kSendCreditUpdate = 8,
    kSendCreditRequest = 16,
    kSendRst = 32,
  };
  enum class Written : std::uint8_t { kOk, kPeerGone };

  // `window` is the receive buffer promised to the guest, in bytes.
  VsockConnection(std::uint64_t its_id, std::uint32_t its_host_port, std::uint32_t its_guest_port,
                  UniqueFd its_socket, State initial, std::uint32_t its_window)
      : id(its_id),
        host_port(its_host_port),
        guest_port(its_guest_port),
        window(its_window),
        socket(std::move(its_socket)),
        state(initial) {}

  // --- from the guest to the host ---

  // Whether the guest kept to the credit it had, for `size` bytes more.
  [[nodiscard]] bool may_receive(std::uint32_t size) const {
    return size <= window - (received_ - forwarded_);
  }
  // Takes bytes from the guest (may_receive() said yes) and passes them on as far as the peer takes them now.
  [[nodiscard]] Written receive(std::span<const iovec> data, std::uint32_t size);
  // Goes on with what waits.
  [[nodiscard]] Written flush();
  [[nodiscard]] bool has_unsent() const { return unsent_begin_ < unsent_.size(); }
  // Gives up what waits and what comes, as a socket does whose peer does not read any more.
  void discard_output();
  // Whether the guest should hear how much room there is.
  [[nodiscard]] bool owes_credit() const {
    return forwarded_ != told_forwarded_ && window - (received_ - told_forwarded_) < window / 2;
  }

  // --- from the host to the guest ---

  // How many bytes the guest has room for.
  [[nodiscard]] std::uint32_t credit() const {
    const std::uint32_t in_flight = sent_ - peer_forwarded_;
    return in_flight < peer_window_ ? peer_window_ - in_flight : 0;
  }
  // Takes what each packet of the guest says of its buffer; false where that cannot be.
  [[nodiscard]] bool update_credit(std::uint32_t buf_alloc, std::uint32_t fwd_cnt);
  void count_sent(std::uint32_t size) { sent_ += size; }

  // Fills in a header to the guest, and counts what it tells as told.
  [[nodiscard]] VsockHeader header(VsockOp op, std::uint64_t guest_cid);

  const std::uint64_t id;
  const std::uint32_t host_port;
  const std::uint32_t guest_port;
  const std::uint32_t window;
  const UniqueFd socket;
  State state;
  std::uint32_t pending = 0;      // Pending bits
  bool readable = false;          // the socket has data, or its end, to read
  bool credit_asked = false;      // since the credit last grew
  bool host_ended = false;        // the peer sends nothing more
  bool host_gone = false;         // the peer receives nothing more
  bool guest_ended = false;       // the guest sends nothing more
  bool guest_gone = false;        // the guest receives nothing more
  std::uint64_t deadline_ns = 0;  // 0: none
  bool in_ready_list = false;
  std::list<VsockConnection*>::iterator place;  // in the mux's list of the ready or of the idle
  std::uint32_t watched = 0;
  Watch watch;

 private:
  std::uint32_t received_ = 0;        // from the guest
  std::uint32_t forwarded_ = 0;       // of these, to the peer
  std::uint32_t told_forwarded_ = 0;  // what the guest knows of that
  std::uint32_t peer_window_ = 0;
  std::uint32_t peer_forwarded_ = 0;
  std::uint32_t sent_ = 0;  // to the guest
  bool discarding_ = false;
  std::vector<std::uint8_t> unsent_;
  std::size_t unsent_begin_ = 0;
};

}  // namespace wisp
