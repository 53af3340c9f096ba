#include "chardev/stream_backend.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

namespace wisp {
namespace {

constexpr std::uint64_t kAtOnce = 1;
// How long the last output may take to go when the back end is destroyed.
constexpr int kFinalFlushMs = 100;
// When output that found no room is tried again where its descriptor cannot be waited for.
constexpr std::uint64_t kRetryNs = 10'000'000;

}  // namespace

StreamBackend::StreamBackend(EventLoop& loop, Log& log, std::string id)
    : loop_(loop), log_(log), id_(std::move(id)) {
  filtered_.reserve(kReadSize);
}

Result<void> StreamBackend::start() {
  WISP_ASSIGN(kick_timer_, timer([this] { turn(); }));
  return {};
}

Result<Watch> StreamBackend::watch(int fd, std::uint32_t events, EventLoop::Callback callback) {
  return loop_.watch(
      fd, events,
      [this, run = std::move(callback)](std::uint32_t what) {
        callback_thread_.store(std::this_thread::get_id(), std::memory_order_relaxed);
        run(what);
        callback_thread_.store({}, std::memory_order_relaxed);
      },
      &loop_mutex_);
}

Result<Timer> StreamBackend::timer(std::function<void()> callback) {
  return loop_.timer(
      [this, run = std::move(callback)] {
        callback_thread_.store(std::this_thread::get_id(), std::memory_order_relaxed);
        run();
        callback_thread_.store({}, std::memory_order_relaxed);
      },
      &loop_mutex_);
}

void StreamBackend::kick(std::uint64_t delay_ns) {
  kick_timer_.arm(delay_ns);
}

std::size_t StreamBackend::write(std::span<const std::uint8_t> bytes) {
  const std::lock_guard lock(state_mutex_);
  if (!connected_) {
    return bytes.size();
  }
  const std::size_t taken = output_.push(bytes);
  if (taken < bytes.size()) {
    owes_writable_ = true;
  }
  const bool at_once = output_.size() > kOutputSize / 2;
  if (!output_.empty() && (!kicked_ || (at_once && !kicked_at_once_))) {
    kicked_ = true;
    kicked_at_once_ = at_once;
    kick(at_once ? kAtOnce : kGatherNs);
  }
  return taken;
}

void StreamBackend::set_receiver(CharReceiver* receiver) {
  if (callback_thread_.load(std::memory_order_relaxed) == std::this_thread::get_id()) {
    receiver_ = receiver;
    told_size_ = {};
  } else {
    const std::lock_guard lock(loop_mutex_);
    receiver_ = receiver;
    told_size_ = {};
  }
  refresh_size();
}

void StreamBackend::resume_input() {
  const std::lock_guard lock(state_mutex_);
  kicked_ = true;
  kicked_at_once_ = true;
  kick(kAtOnce);
}

void StreamBackend::refresh_size() {
  look_at_size_.store(true, std::memory_order_relaxed);
  resume_input();
}

bool StreamBackend::is_connected() const {
  const std::lock_guard lock(state_mutex_);
  return connected_;
}

void StreamBackend::attach_first(UniqueFd in, UniqueFd out) {
  const std::lock_guard lock(loop_mutex_);
  attach(std::move(in), std::move(out));
}

void StreamBackend::attach(UniqueFd in, UniqueFd out) {
  in_ = std::move(in);
  out_ = std::move(out);
  struct stat info{};
  out_is_socket_ = out_.valid() && ::fstat(out_.get(), &info) == 0 && S_ISSOCK(info.st_mode);
  in_pollable_ = true;
  in_wanted_ = false;
  hung_up_ = false;
  if (in_.valid()) {
    auto watched = watch(in_.get(), 0, [this](std::uint32_t events) { input_event(events); });
    // Regular files and the null device cannot be waited for, as they are always ready.
    in_pollable_ = watched.has_value();
    if (watched.has_value()) {
      in_watch_ = *std::move(watched);
    }
  }
  {
    const std::lock_guard lock(state_mutex_);
    connected_ = true;
  }
  if (receiver_ != nullptr) {
    receiver_->connected();
  }
  refresh_size();
}

void StreamBackend::detach() {
  in_watch_.stop();
  out_watch_.stop();
  in_.reset();
  out_.reset();
  bool was_connected = false;
  {
    const std::lock_guard lock(state_mutex_);
    was_connected = std::exchange(connected_, false);
    output_.clear();
  }
  if (!was_connected) {
    return;
  }
  if (receiver_ != nullptr) {
    receiver_->disconnected();
  }
  tell_writable();
  peer_gone();
}

void StreamBackend::turn() {
  {
    const std::lock_guard lock(state_mutex_);
    kicked_ = false;
    kicked_at_once_ = false;
  }
  if (look_at_size_.exchange(false, std::memory_order_relaxed)) {
    tell_size();
  }
  write_output();
  read_input();
}

void StreamBackend::tell_size() {
  const auto now = size();
  if (now != told_size_ && receiver_ != nullptr) {
    told_size_ = now;
    receiver_->resized(now.first, now.second);
  }
}

void StreamBackend::input_event(std::uint32_t events) {
  if ((events & (EPOLLHUP | EPOLLERR)) != 0 && (events & EPOLLIN) == 0) {
    // Told although nothing was waited for. The last bytes stay for a receiver that has no room now.
    in_watch_.stop();
    hung_up_ = true;
    if (receiver_ == nullptr) {
      end_unheard();
      return;
    }
  }
  read_input();
}

void StreamBackend::read_input() {
  std::array<std::uint8_t, kReadSize> buffer;
  for (std::size_t i = 0; in_.valid() && i < kReadsPerTurn; ++i) {
    const std::size_t room = receiver_ != nullptr ? receiver_->can_receive() : 0;
    if (room == 0) {
      break;
    }
    const ssize_t count = ::read(in_.get(), buffer.data(), std::min(room, buffer.size()));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0 && errno == EAGAIN) {
      break;
    }
    if (count <= 0) {
      input_ended();
      return;
    }
    deliver(std::span(buffer).first(static_cast<std::size_t>(count)));
  }
  watch_input();
}

// Goes on waiting for input where somebody has room for it.
void StreamBackend::watch_input() {
  if (!in_.valid()) {
    return;
  }
  if (hung_up_ && receiver_ == nullptr) {
    end_unheard();
    return;
  }
  const bool wanted = receiver_ != nullptr && receiver_->can_receive() > 0;
  if (!in_watch_.active()) {
    // A file, or a peer that has gone: what is left can be read at once.
    if (wanted && (!in_pollable_ || hung_up_)) {
      resume_input();
    }
    return;
  }
  if (wanted != in_wanted_) {
    in_wanted_ = wanted;
    in_watch_.set_events(wanted ? EPOLLIN : 0U);
  }
}

void StreamBackend::input_ended() {
  if (end_of_input_is_end_of_peer()) {
    detach();
  } else {
    in_watch_.stop();
    in_.reset();
  }
}

// The peer has gone, and nobody will ask for its last bytes. Left in a pseudo-terminal, they would be taken
// for a new peer's, again and again.
void StreamBackend::end_unheard() {
  std::array<std::uint8_t, kReadSize> dropped;
  for (std::size_t i = 0; i < kReadsPerTurn && ::read(in_.get(), dropped.data(), dropped.size()) > 0; ++i) {
  }
  input_ended();
}

void StreamBackend::deliver(std::span<const std::uint8_t> bytes) {
  if (escape_ == nullptr) {
    receiver_->receive(bytes);
    return;
  }
  filtered_.clear();
  escape_->filter(bytes, filtered_);
  if (!filtered_.empty() && receiver_ != nullptr) {
    receiver_->receive(filtered_);
  }
}

StreamBackend::Written StreamBackend::write_chunk() {
  std::array<std::uint8_t, kReadSize> chunk;
  std::size_t size = 0;
  {
    const std::lock_guard lock(state_mutex_);
    size = output_.peek(chunk);
  }
  if (size == 0) {
    return Written::kNothingLeft;
  }
  ssize_t count = static_cast<ssize_t>(size);  // without a descriptor it is dropped
  if (out_.valid()) {
    count = out_is_socket_ ? ::send(out_.get(), chunk.data(), size, MSG_NOSIGNAL | MSG_DONTWAIT)
                           : ::write(out_.get(), chunk.data(), size);
  }
  if (count < 0) {
    if (errno == EINTR) {
      return Written::kSome;
    }
    return errno == EAGAIN ? Written::kNoRoom : Written::kFailed;
  }
  const std::lock_guard lock(state_mutex_);
  output_.drop(static_cast<std::size_t>(count));
  return Written::kSome;
}

void StreamBackend::drop_output() {
  const std::lock_guard lock(state_mutex_);
  output_.clear();
}

void StreamBackend::output_failed(int error) {
  if (!end_of_input_is_end_of_peer()) {
    log_.warning("chardev {}: output is dropped from now on: {}", id_, errno_text(error));
    out_watch_.stop();
    out_.reset();
    drop_output();
    return;
  }
  // What the peer sent before it went is still for the receiver; reading comes to its end by itself.
  if (in_.valid() && receiver_ != nullptr && receiver_->can_receive() > 0) {
    out_watch_.stop();
    drop_output();
    return;
  }
  detach();
}

void StreamBackend::write_output() {
  // No more than there is now: a guest that prints without pause must not keep the loop here. Whoever adds
  // more sets the timer.
  std::size_t chunks = 0;
  {
    const std::lock_guard lock(state_mutex_);
    chunks = (output_.size() + kReadSize - 1) / kReadSize;
  }
  Written written = chunks == 0 ? Written::kNothingLeft : Written::kSome;
  for (; chunks > 0 && written == Written::kSome; --chunks) {
    written = write_chunk();
  }
  if (written == Written::kFailed) {
    output_failed(errno);
  } else if (written == Written::kSome) {
    resume_if_output_waits();
  }
  wait_for_room(written == Written::kNoRoom);
  bool room = false;
  {
    const std::lock_guard lock(state_mutex_);
    room = output_.room() >= kOutputSize / 2;
  }
  if (room) {
    tell_writable();
  }
}

// A short write or an interrupted one leaves bytes for which no timer may be set.
void StreamBackend::resume_if_output_waits() {
  const std::lock_guard lock(state_mutex_);
  if (!output_.empty() && !kicked_) {
    kicked_ = true;
    kick(kGatherNs);
  }
}

// Only where a write found no room: some kinds of descriptors (regular files) always have it, and cannot be
// watched.
void StreamBackend::wait_for_room(bool wanted) {
  if (!wanted) {
    out_watch_.stop();
  } else if (!out_watch_.active()) {
    auto watched = watch(out_.get(), EPOLLOUT, [this](std::uint32_t) { write_output(); });
    if (watched.has_value()) {
      out_watch_ = *std::move(watched);
      return;
    }
    const std::lock_guard lock(state_mutex_);
    kicked_ = true;
    kick(kRetryNs);
  }
}

void StreamBackend::tell_writable() {
  {
    const std::lock_guard lock(state_mutex_);
    if (!std::exchange(owes_writable_, false)) {
      return;
    }
  }
  if (receiver_ != nullptr) {
    receiver_->writable();
  }
}

void StreamBackend::stop_watches() {
  in_watch_.stop();
  out_watch_.stop();
  kick_timer_ = Timer();
  receiver_ = nullptr;
}

void StreamBackend::flush_finally() {
  constexpr int kStepMs = 10;
  for (int waited = 0; waited < kFinalFlushMs && out_.valid(); waited += kStepMs) {
    Written written = Written::kSome;
    while (written == Written::kSome) {
      written = write_chunk();
    }
    if (written != Written::kNoRoom) {
      return;
    }
    pollfd waiting{.fd = out_.get(), .events = POLLOUT, .revents = 0};
    ::poll(&waiting, 1, kStepMs);
  }
}

}  // namespace wisp
