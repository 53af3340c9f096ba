#include "virtio/vsock_mux.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace wisp {
namespace {

// Ports that the guest sees for connections from the host.
constexpr std::uint32_t kFirstHostPort = 1U << 30;
constexpr std::uint32_t kLastHostPort = (1U << 31) - 1;
// Receive buffer promised for each stream: large for the first ones, so that one fast stream does not wait
// for credit; small for the many, so that all together stay below 80 MiB.
constexpr std::uint32_t kLargeWindow = 256 * 1024;
constexpr std::uint32_t kSmallWindow = 64 * 1024;
constexpr std::size_t kLargeWindows = 64;
// The longest payload put into one packet.
constexpr std::uint32_t kMaxPayload = 64 * 1024;
// How long an answer to a request, or a guest's RST, may take.
constexpr std::uint64_t kTimeoutNs = 5'000'000'000;
constexpr std::uint64_t kTickNs = 500'000'000;

std::uint64_t ports_key(std::uint32_t host_port, std::uint32_t guest_port) {
  return (std::uint64_t{host_port} << 32) | guest_port;
}

}  // namespace

VsockMux::VsockMux(Strand& strand, const Clock& clock, std::uint64_t guest_cid, std::string path,
                   std::function<void()> on_output)
    : strand_(strand),
      clock_(clock),
      guest_cid_(guest_cid),
      path_(std::move(path)),
      on_output_(std::move(on_output)),
      next_host_port_(kFirstHostPort) {}

Result<std::unique_ptr<VsockMux>> VsockMux::create(Strand& strand, const Clock& clock,
                                                   std::uint64_t guest_cid, std::string path,
                                                   std::function<void()> on_output) {
  std::unique_ptr<VsockMux> mux(
      new VsockMux(strand, clock, guest_cid, std::move(path), std::move(on_output)));
  WISP_ASSIGN(mux->timer_, strand.timer([raw = mux.get()] { raw->on_timer(); }));
  WISP_ASSIGN(mux->listener_, VsockListener::create(strand, clock, mux->path_, *mux));
  return mux;
}

VsockMux::~VsockMux() {
  if (listener_ != nullptr) {
    stop();
  }
}

void VsockMux::start() {
  started_ = true;
  update_listener();
}

void VsockMux::stop() {
  started_ = false;
  by_ports_.clear();
  ready_.clear();
  idle_.clear();
  connections_.clear();
  strays_.clear();
  listener_->drop_all();
  update_listener();
  timer_.disarm();
  timer_armed_ = false;
}

void VsockMux::hold() {
  held_ = true;
  update_listener();
  for (auto& [id, connection] : connections_) {
    update_watch(*connection);
  }
}

void VsockMux::unhold() {
  held_ = false;
  update_listener();
  for (auto& [id, connection] : connections_) {
    update_watch(*connection);
  }
}

void VsockMux::update_listener() {
  listener_->update(started_ && !held_, kMaxConnections - std::min(connections_.size(), kMaxConnections));
}

// --- programs of the host that connect ---

std::uint32_t VsockMux::free_host_port(std::uint32_t guest_port) {
  // Ends: there are far fewer connections than ports.
  while (true) {
    const std::uint32_t port = next_host_port_;
    next_host_port_ = port == kLastHostPort ? kFirstHostPort : port + 1;
    if (!by_ports_.contains(ports_key(port, guest_port))) {
      return port;
    }
  }
}

void VsockMux::host_connected(UniqueFd socket, std::uint32_t guest_port) {
  Connection* connection =
      add(free_host_port(guest_port), guest_port, std::move(socket), Connection::State::kRequested);
  connection->pending = Connection::kSendRequest;
  connection->deadline_ns = clock_.monotonic_ns() + kTimeoutNs;
  arm_timer();
  schedule(*connection);
  on_output_();
}

// --- the table ---

VsockMux::Connection* VsockMux::add(std::uint32_t host_port, std::uint32_t guest_port, UniqueFd socket,
                                    Connection::State state) {
  const std::uint64_t id = next_id_++;
  const std::uint32_t window = connections_.size() < kLargeWindows ? kLargeWindow : kSmallWindow;
  auto owned = std::make_unique<Connection>(id, host_port, guest_port, std::move(socket), state, window);
  Connection* connection = owned.get();
  connections_.emplace(id, std::move(owned));
  by_ports_.emplace(ports_key(host_port, guest_port), connection);
  connection->place = idle_.insert(idle_.end(), connection);
  return connection;
}

void VsockMux::remove(Connection& connection) {
  // One that the guest was done with may have given its ports to another.
  const auto named = by_ports_.find(ports_key(connection.host_port, connection.guest_port));
  if (named != by_ports_.end() && named->second == &connection) {
    by_ports_.erase(named);
  }
  (connection.in_ready_list ? ready_ : idle_).erase(connection.place);
  connection.watch.stop();
  connections_.erase(connection.id);
  update_listener();
}

void VsockMux::kill(Connection& connection) {
  connection.pending = Connection::kSendRst;
  connection.readable = false;
  connection.state = Connection::State::kClosing;
  connection.deadline_ns = 0;
  connection.host_ended = connection.host_gone = true;
  connection.discard_output();
  // The peer learns at once, the guest when it has a buffer.
  ::shutdown(connection.socket.get(), SHUT_RDWR);
  connection.watch.stop();
  connection.watched = 0;
  schedule(connection);
}

void VsockMux::answer_rst(const VsockHeader& header) {
  if (header.op == VsockOp::kRst) {
    return;
  }
  strays_.push_back({.src_cid = header.dst_cid,
                     .dst_cid = header.src_cid,
                     .src_port = header.dst_port,
                     .dst_port = header.src_port,
                     .type = header.type,
                     .op = VsockOp::kRst});
}

// --- packets of the guest ---

void VsockMux::handle(const VsockHeader& header, const DescriptorChain& chain) {
  if (header.src_cid != guest_cid_) {
    return;  // nobody could get an answer
  }
  if (header.dst_cid != kVsockHostCid || header.type != kVsockTypeStream) {
    answer_rst(header);
    return;
  }
  const auto found = by_ports_.find(ports_key(header.dst_port, header.src_port));
  if (found == by_ports_.end()) {
    if (header.op == VsockOp::kRequest) {
      connect_host(header);
    } else {
      answer_rst(header);
    }
    return;
  }
  Connection& connection = *found->second;
  if (header.op == VsockOp::kRst) {
    if (connection.has_unsent() && connection.guest_ended) {
      drain(connection);
    } else {
      remove(connection);
    }
    return;
  }
  if ((connection.pending & Connection::kSendRst) != 0) {
    return;  // ended already; the guest has not heard it yet
  }
  if (!connection.update_credit(header.buf_alloc, header.fwd_cnt)) {
    kill(connection);
    return;
  }
  switch (header.op) {
    case VsockOp::kResponse:
      if (connection.state != Connection::State::kRequested ||
          (connection.pending & Connection::kSendRequest) != 0) {
        kill(connection);
        return;
      } else {
        const std::string ok = fmt::format("OK {}\n", connection.host_port);
        if (::send(connection.socket.get(), ok.data(), ok.size(), MSG_DONTWAIT | MSG_NOSIGNAL) !=
            static_cast<ssize_t>(ok.size())) {
          kill(connection);
          return;
        }
        connection.state = Connection::State::kEstablished;
        connection.deadline_ns = 0;
      }
      break;
    case VsockOp::kShutdown:
    case VsockOp::kRw:
    case VsockOp::kCreditUpdate:
    case VsockOp::kCreditRequest:
      if (connection.state == Connection::State::kRequested) {
        kill(connection);
        return;
      }
      handle_established(connection, header, chain);
      return;
    default:  // a second request, or nothing known
      kill(connection);
      return;
  }
  schedule(connection);
  update_watch(connection);
}

void VsockMux::handle_established(Connection& connection, const VsockHeader& header,
                                  const DescriptorChain& chain) {
  switch (header.op) {
    case VsockOp::kShutdown:
      on_guest_shutdown(connection, header.flags);
      return;
    case VsockOp::kRw: {
      if (connection.guest_ended || !connection.may_receive(header.length)) {
        kill(connection);
        return;
      }
      iovecs_.clear();
      chain.readable_iovecs(kVsockHeaderSize, header.length, iovecs_);
      after_write(connection, connection.receive(iovecs_, header.length));
      return;
    }
    case VsockOp::kCreditRequest:
      connection.pending |= Connection::kSendCreditUpdate;
      break;
    default:  // kCreditUpdate: done with the header
      break;
  }
  schedule(connection);
  update_watch(connection);
}

void VsockMux::connect_host(const VsockHeader& header) {
  if (connection_count() >= kMaxConnections) {
    // A peer that does not read what a finished stream left does not keep others out.
    for (auto& [id, connection] : connections_) {
      if (connection->state == Connection::State::kDraining) {
        remove(*connection);
        break;
      }
    }
  }
  auto socket = connection_count() < kMaxConnections ? make_unix_socket() : Result<UniqueFd>(UniqueFd());
  if (!socket || !socket->valid() ||
      connect_unix_socket(socket->get(), fmt::format("{}_{}", path_, header.dst_port)) != 0) {
    answer_rst(header);
    return;
  }
  Connection* connection =
      add(header.dst_port, header.src_port, *std::move(socket), Connection::State::kEstablished);
  connection->pending = Connection::kSendResponse;
  (void)connection->update_credit(header.buf_alloc, 0);
  schedule(*connection);
  update_watch(*connection);
  update_listener();
}

// 5.10.6.4: either direction may end first; when both did, a RST answers.
void VsockMux::on_guest_shutdown(Connection& connection, std::uint32_t flags) {
  if ((flags & kVsockNoReceive) != 0 && !connection.guest_gone) {
    connection.guest_gone = true;
    connection.host_ended = true;  // or as good as
    connection.readable = false;
    ::shutdown(connection.socket.get(), SHUT_RD);
  }
  if ((flags & kVsockNoSend) != 0) {
    connection.guest_ended = true;
  }
  if (connection.guest_ended && connection.guest_gone) {
    answer_rst({.src_cid = guest_cid_,
                .dst_cid = kVsockHostCid,
                .src_port = connection.guest_port,
                .dst_port = connection.host_port,
                .op = VsockOp::kShutdown});
    if (connection.has_unsent()) {
      drain(connection);
    } else {
      remove(connection);
    }
    return;
  }
  finish_output(connection);
  schedule(connection);
  update_watch(connection);
}

// The guest knows nothing of this stream any more; its ports are free.
void VsockMux::drain(Connection& connection) {
  by_ports_.erase(ports_key(connection.host_port, connection.guest_port));
  connection.state = Connection::State::kDraining;
  connection.pending = 0;
  connection.readable = false;
  connection.deadline_ns = 0;
  connection.guest_ended = connection.guest_gone = true;
  schedule(connection);
  update_watch(connection);
}

// Tells the peer that the guest sends no more, once all went out.
void VsockMux::finish_output(Connection& connection) {
  if (connection.guest_ended && !connection.has_unsent()) {
    ::shutdown(connection.socket.get(), SHUT_WR);
  }
}

void VsockMux::after_write(Connection& connection, Connection::Written written) {
  if (connection.state == Connection::State::kDraining) {
    if (written == Connection::Written::kPeerGone || !connection.has_unsent()) {
      remove(connection);
    } else {
      update_watch(connection);
    }
    return;
  }
  if (written == Connection::Written::kPeerGone) {
    on_host_gone(connection);
    return;
  }
  finish_output(connection);
  if (connection.owes_credit()) {
    connection.pending |= Connection::kSendCreditUpdate;
  }
  schedule(connection);
  update_watch(connection);
}

// The peer does not read any more; what it sent before its end still counts.
void VsockMux::on_host_gone(Connection& connection) {
  if (!connection.host_gone) {
    connection.host_gone = true;
    connection.discard_output();
    connection.pending |= Connection::kSendShutdown;
    begin_closing(connection);
  }
  schedule(connection);
  update_watch(connection);
}

void VsockMux::begin_closing(Connection& connection) {
  if (connection.host_gone && connection.host_ended && connection.state == Connection::State::kEstablished) {
    connection.state = Connection::State::kClosing;
    connection.deadline_ns = clock_.monotonic_ns() + kTimeoutNs;
    arm_timer();
  }
}

// --- packets to the guest ---

bool VsockMux::has_something(const Connection& connection) const {
  return connection.pending != 0 ||
         (connection.readable && (connection.credit() > 0 || !connection.credit_asked));
}

void VsockMux::schedule(Connection& connection) {
  const bool wanted = has_something(connection);
  if (wanted != connection.in_ready_list) {
    if (wanted) {
      ready_.splice(ready_.end(), idle_, connection.place);
    } else {
      idle_.splice(idle_.end(), ready_, connection.place);
    }
    connection.in_ready_list = wanted;
  }
}

std::uint32_t VsockMux::produce(const DescriptorChain& chain) {
  if (!strays_.empty()) {
    chain.write(0, strays_.front().bytes());
    strays_.pop_front();
    return kVsockHeaderSize;
  }
  while (!ready_.empty()) {
    Connection& connection = *ready_.front();
    // Each gets its turn.
    ready_.splice(ready_.end(), ready_, connection.place);
    const std::uint64_t id = connection.id;
    const std::uint32_t size = produce_from(connection, chain);
    if (connections_.contains(id)) {
      schedule(connection);
      // One that goes on is left watched: it is served again before the loop looks.
      if (!connection.in_ready_list) {
        update_watch(connection);
      }
    }
    if (size > 0) {
      return size;
    }
  }
  return 0;
}

std::uint32_t VsockMux::produce_from(Connection& connection, const DescriptorChain& chain) {
  const auto tell = [&](std::uint32_t bit, VsockOp op, std::uint32_t flags = 0) {
    connection.pending &= ~bit;
    VsockHeader header = connection.header(op, guest_cid_);
    header.flags = flags;
    chain.write(0, header.bytes());
    return static_cast<std::uint32_t>(kVsockHeaderSize);
  };
  const std::uint32_t pending = connection.pending;
  if ((pending & Connection::kSendRst) != 0) {
    const std::uint32_t size = tell(Connection::kSendRst, VsockOp::kRst);
    remove(connection);
    return size;
  }
  if ((pending & Connection::kSendRequest) != 0) {
    return tell(Connection::kSendRequest, VsockOp::kRequest);
  }
  if ((pending & Connection::kSendResponse) != 0) {
    return tell(Connection::kSendResponse, VsockOp::kResponse);
  }
  if ((pending & Connection::kSendShutdown) != 0) {
    return tell(Connection::kSendShutdown, VsockOp::kShutdown,
                (connection.host_gone ? kVsockNoReceive : 0) | (connection.host_ended ? kVsockNoSend : 0));
  }
  if (connection.readable && connection.credit() > 0) {
    if (chain.writable_size() == kVsockHeaderSize) {
      // No room for data: the buffer is used up for what fits.
      return tell(Connection::kSendCreditUpdate, VsockOp::kCreditUpdate);
    }
    const std::uint32_t size = produce_data(connection, chain);
    if (size > 0 || (connection.pending & Connection::kSendShutdown) != 0) {
      return size;
    }
  }
  if (connection.readable && connection.credit() == 0 && !connection.credit_asked) {
    connection.credit_asked = true;
    return tell(Connection::kSendCreditRequest, VsockOp::kCreditRequest);
  }
  if ((pending & Connection::kSendCreditUpdate) != 0) {
    return tell(Connection::kSendCreditUpdate, VsockOp::kCreditUpdate);
  }
  return 0;
}

// Reads straight from the socket into the guest's buffer.
std::uint32_t VsockMux::produce_data(Connection& connection, const DescriptorChain& chain) {
  const std::uint32_t room = std::min<std::uint32_t>(
      static_cast<std::uint32_t>(chain.writable_size() - kVsockHeaderSize), kMaxPayload);
  const std::uint32_t most = std::min(room, connection.credit());
  iovecs_.clear();
  chain.writable_iovecs(kVsockHeaderSize, most, iovecs_);
  msghdr message{};
  message.msg_iov = iovecs_.data();
  message.msg_iovlen = iovecs_.size();
  const ssize_t got = ::recvmsg(connection.socket.get(), &message, MSG_DONTWAIT);
  if (got > 0) {
    const auto size = static_cast<std::uint32_t>(got);
    connection.readable = size == most;  // less: there was no more
    connection.count_sent(size);
    connection.pending &= ~static_cast<std::uint32_t>(Connection::kSendCreditUpdate);
    VsockHeader header = connection.header(VsockOp::kRw, guest_cid_);
    header.length = size;
    chain.write(0, header.bytes());
    return static_cast<std::uint32_t>(kVsockHeaderSize) + size;
  }
  connection.readable = false;
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
    return 0;
  }
  // The end. Whether the peer still reads, the socket knows.
  connection.host_ended = true;
  connection.pending |= Connection::kSendShutdown;
  pollfd state{.fd = connection.socket.get(), .events = 0, .revents = 0};
  if (got < 0 || (::poll(&state, 1, 0) == 1 && (state.revents & POLLHUP) != 0 && !connection.guest_ended)) {
    connection.host_gone = true;
    connection.discard_output();
  }
  begin_closing(connection);
  return 0;
}

// --- readiness ---

void VsockMux::settle() {
  for (Connection* connection : ready_) {
    update_watch(*connection);
  }
}

void VsockMux::update_watch(Connection& connection) {
  std::uint32_t events = 0;
  bool wanted = false;
  const bool established = connection.state == Connection::State::kEstablished;
  if (!held_ && (established || connection.state == Connection::State::kDraining)) {
    if (established && !connection.host_ended && !connection.guest_gone && !connection.readable) {
      events |= EPOLLIN;
    }
    if (connection.has_unsent()) {
      events |= EPOLLOUT;
    }
    // With no events the end of the peer is still told, once.
    wanted = events != 0 || !connection.host_gone;
    wanted = wanted && !(connection.readable && events == 0);
  }
  if (!wanted) {
    connection.watch.stop();
    connection.watched = 0;
    return;
  }
  if (connection.watch.active()) {
    if (events != connection.watched) {
      connection.watch.set_events(events);
    }
  } else {
    auto watch = strand_.watch(connection.socket.get(), events,
                               [this, id = connection.id](std::uint32_t now) { on_ready(id, now); });
    if (!watch) {
      kill(connection);
      return;
    }
    connection.watch = *std::move(watch);
  }
  connection.watched = events;
}

void VsockMux::on_ready(std::uint64_t id, std::uint32_t events) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) {
    return;
  }
  Connection& connection = *found->second;
  const bool ended = (events & (EPOLLHUP | EPOLLERR)) != 0;
  if ((connection.watched & EPOLLOUT) != 0 && ((events & EPOLLOUT) != 0 || ended)) {
    after_write(connection, connection.flush());
  }
  if (!connections_.contains(id)) {
    return;
  }
  if ((connection.watched & EPOLLIN) != 0 && ((events & EPOLLIN) != 0 || ended)) {
    connection.readable = true;
    schedule(connection);
  } else if (ended && connection.watched == 0) {
    on_host_gone(connection);
  }
  on_output_();
  if (connections_.contains(id)) {
    update_watch(connection);
  }
}

void VsockMux::arm_timer() {
  if (!std::exchange(timer_armed_, true)) {
    timer_.arm(kTickNs);
  }
}

void VsockMux::on_timer() {
  timer_armed_ = false;
  if (held_) {
    arm_timer();
    return;
  }
  bool more = listener_->tick();
  const std::uint64_t now = clock_.monotonic_ns();
  for (auto& [id, connection] : connections_) {
    if (connection->deadline_ns == 0) {
      continue;
    }
    if (connection->deadline_ns <= now) {
      kill(*connection);
    } else {
      more = true;
    }
  }
  if (more) {
    arm_timer();
  }
  on_output_();
}

}  // namespace wisp
