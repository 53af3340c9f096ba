#include "virtio/net_queue_pair.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/bytes.h"
#include "base/unique_fd.h"

namespace wisp {
namespace {

// Work per call: a busy queue gives the loop back after so much, and goes on by a kick of its own.
constexpr int kFramesPerCall = 64;
constexpr std::size_t kBytesPerCall = 512UL * 1024;
// Buffers to have ready for a frame of ordinary size. After a longer one, there are enough for the longest.
constexpr std::size_t kSmallFrame = 2048;
// How long a frame waits for a driver that has too few buffers for it.
constexpr std::uint64_t kHeldNs = 1'000'000'000;
// Where the number of buffers stands in the header.
constexpr std::size_t kBufferCountOffset = 10;

}  // namespace

std::uint8_t* NetQueuePair::buffer() {
  if (buffer_ == nullptr) {
    buffer_ = std::make_unique_for_overwrite<std::uint8_t[]>(kBufferSize);
  }
  return buffer_.get();
}

Result<void> NetQueuePair::start(std::optional<Queue> rx, std::optional<Queue> tx, int rx_kick, int tx_kick,
                                 VirtioInterrupts& interrupts, const Negotiated& negotiated) {
  WISP_ASSIGN(Timer timer, strand_.timer([this] {
    if (held_size_ > 0) {
      held_size_ = 0;
      ++counters_.rx_dropped;
      process_rx();
    }
  }));
  held_timer_.emplace(std::move(timer));
  rx_ = std::move(rx);
  tx_ = std::move(tx);
  rx_kick_ = rx_kick;
  tx_kick_ = tx_kick;
  interrupts_ = &interrupts;
  negotiated_ = negotiated;
  rx_stalled_ = tx_blocked_ = false;
  held_size_ = 0;
  rx_target_ = kSmallFrame;
  update_watch();
  return {};
}

void NetQueuePair::stop() {
  watch_.stop();
  watched_events_ = 0;
  held_timer_.reset();
  receiving_ = false;
  held_size_ = 0;
  chain_count_ = 0;
  rx_.reset();
  tx_.reset();
  interrupts_ = nullptr;
}

void NetQueuePair::set_receiving(bool on) {
  receiving_ = on;
  update_watch();
}

void NetQueuePair::set_link(bool up) {
  link_up_ = up;
  update_watch();
}

void NetQueuePair::hold() {
  held_still_ = true;
  update_watch();
}

void NetQueuePair::unhold() {
  held_still_ = false;
  update_watch();
}

void NetQueuePair::update_watch() {
  std::uint32_t events = 0;
  if (!held_still_ && !closed_) {
    events |= rx_ && !rx_->broken() && receiving_ && link_up_ && !rx_stalled_
                  ? static_cast<std::uint32_t>(EPOLLIN)
                  : 0U;
    events |= tx_ && !tx_->broken() && tx_blocked_ ? static_cast<std::uint32_t>(EPOLLOUT) : 0U;
  }
  if (events == watched_events_ && (events == 0 || watch_.active())) {
    return;
  }
  watched_events_ = events;
  if (watch_.active()) {
    if (closed_) {
      watch_.stop();
    } else {
      // With no events, errors are still told; on_ready() then ends the watch.
      watch_.set_events(events);
    }
    return;
  }
  if (events != 0) {
    auto watch = strand_.watch(backend_.poll_fd(pair_), events, [this](std::uint32_t now) { on_ready(now); });
    if (!watch) {
      closed();
      return;
    }
    watch_ = *std::move(watch);
  }
}

void NetQueuePair::on_ready(std::uint32_t events) {
  if (watched_events_ == 0) {
    // An error of the back end while nobody can take what it has: it is looked at when somebody can.
    watch_.stop();
    return;
  }
  if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) != 0 && tx_blocked_) {
    process_tx();
  }
  if ((events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0 && (watched_events_ & EPOLLIN) != 0) {
    process_rx();
  }
}

void NetQueuePair::closed() {
  closed_ = true;
  held_size_ = 0;
  update_watch();
  signal_eventfd(tx_kick_);  // what waited for room is dropped
  owner_.backend_closed();
}

void NetQueuePair::broken(bool rx) {
  update_watch();
  owner_.queue_broken(static_cast<std::uint16_t>(2 * pair_ + (rx ? 0 : 1)));
}

// --- receiving ---

void NetQueuePair::process_rx() {
  if (!rx_ || rx_->broken() || !receiving_ || !link_up_ || held_still_ || closed_) {
    return;
  }
  rx_stalled_ = false;
  rx_->disable_notifications();
  const std::uint64_t bytes_before = counters_.rx_bytes;
  bool listening = false;
  Step step = Step::kFrame;
  for (int frames = 0; step == Step::kFrame; ++frames) {
    if (frames == kFramesPerCall || counters_.rx_bytes - bytes_before >= kBytesPerCall) {
      signal_eventfd(rx_kick_);
      break;
    }
    step = held_size_ > 0 ? deliver_held() : receive_one();
    if (step == Step::kStalled) {
      // Ask to be told of new buffers. Where some came in between, they are looked at and this is done again:
      // with the event index, the driver does not tell of those behind them before it is asked anew.
      give_back();
      listening = true;
      if (rx_->enable_notifications_of_more()) {
        step = Step::kFrame;
      }
    }
  }
  give_back();
  rx_stalled_ = step == Step::kStalled;
  if (listening && !rx_stalled_) {
    rx_->disable_notifications();
  }
  if (rx_->take_interrupt_wish()) {
    interrupts_->queue_used(static_cast<std::uint16_t>(2 * pair_));
  }
  if (rx_->broken()) {
    broken(true);
  } else if (step == Step::kOver) {
    closed();
  } else {
    update_watch();
  }
}

bool NetQueuePair::pop_one() {
  if (chain_count_ == chains_.size()) {
    chains_.emplace_back();
  }
  DescriptorChain& chain = chains_[chain_count_];
  if (rx_->pop(chain) != PopResult::kChain) {
    return false;
  }
  if (chain.writable_size() < kVnetHeaderSize) {
    // Too small even for a header (5.1.6.3.1): goes back unused, once it is the oldest.
    if (chain_count_ == 0) {
      rx_->push(chain, 0);
      discarded_ = true;
    } else {
      rx_->undo_pop(chain);
    }
    return false;
  }
  ++chain_count_;
  rx_capacity_ += chain.writable_size();
  return true;
}

bool NetQueuePair::prefetch(std::size_t size) {
  while (rx_capacity_ < size) {
    if ((chain_count_ > 0 && !negotiated_.mergeable) || !pop_one()) {
      return false;
    }
  }
  return true;
}

// Newest first, as Queue::undo_pop() wants it.
void NetQueuePair::give_back() {
  while (chain_count_ > 0) {
    rx_->undo_pop(chains_[--chain_count_]);
  }
  rx_capacity_ = 0;
}

// Puts bytes at an offset of what the popped chains hold together.
void NetQueuePair::write_scattered(std::size_t offset, std::span<const std::uint8_t> bytes) {
  for (std::size_t i = 0; i < chain_count_ && !bytes.empty(); ++i) {
    const std::size_t size = chains_[i].writable_size();
    if (offset >= size) {
      offset -= size;
      continue;
    }
    bytes = bytes.subspan(chains_[i].write(offset, bytes));
    offset = 0;
  }
}

// Returns the first chains with a frame of `size` bytes, header included; the others stay popped.
void NetQueuePair::push_frame(std::size_t size) {
  std::size_t used = 0;
  for (std::size_t covered = 0; covered < size; ++used) {
    covered += chains_[used].writable_size();
  }
  std::array<std::uint8_t, 2> count{};
  store_le(count.data(), static_cast<std::uint16_t>(used));
  chains_[0].write(kBufferCountOffset, count);
  std::size_t left = size;
  for (std::size_t i = 0; i < used; ++i) {
    const auto written = static_cast<std::uint32_t>(std::min<std::size_t>(left, chains_[i].writable_size()));
    rx_->stage(chains_[i], written);
    left -= written;
    rx_capacity_ -= chains_[i].writable_size();
  }
  // All at once (5.1.6.4): a driver that looks in between would take the frame for a broken one, and its
  // other buffers for frames.
  rx_->publish();
  std::rotate(chains_.begin(), chains_.begin() + static_cast<std::ptrdiff_t>(used),
              chains_.begin() + static_cast<std::ptrdiff_t>(chain_count_));
  chain_count_ -= used;
  ++counters_.rx_frames;
  counters_.rx_bytes += size - kVnetHeaderSize;
}

NetQueuePair::Step NetQueuePair::deliver_held() {
  discarded_ = false;
  if (!prefetch(held_size_)) {
    if (rx_->broken()) {
      return Step::kOver;
    }
    if (discarded_) {
      return Step::kFrame;
    }
    // A driver that already gave most of its ring will not give enough for this frame.
    if (chain_count_ >= rx_->size() / 2U) {
      held_size_ = 0;
      ++counters_.rx_dropped;
      return Step::kFrame;
    }
    held_timer_->arm(kHeldNs);
    return Step::kStalled;
  }
  held_timer_->disarm();
  write_scattered(0, std::span(buffer_.get(), held_size_));
  push_frame(std::exchange(held_size_, 0));
  return Step::kFrame;
}

// Frames go straight into the driver's buffers; what does not fit there goes to the end of buffer_, at the
// place where it would stand if the whole frame were there.
NetQueuePair::Step NetQueuePair::receive_one() {
  discarded_ = false;
  (void)prefetch(rx_target_);
  if (rx_->broken()) {
    return Step::kOver;
  }
  if (chain_count_ == 0) {
    return discarded_ ? Step::kFrame : Step::kStalled;
  }
  const std::size_t skip = backend_.has_vnet_header() ? 0 : kVnetHeaderSize;
  std::size_t direct = std::min(rx_capacity_, kBufferSize);
  iovecs_.clear();
  std::size_t left = direct;
  for (std::size_t i = 0; i < chain_count_ && left > 0; ++i) {
    const std::size_t from = i == 0 ? skip : 0;
    const std::size_t size = std::min<std::size_t>(left, chains_[i].writable_size());
    chains_[i].writable_iovecs(from, size - from, iovecs_);
    left -= size;
  }
  if (iovecs_.size() >= kMaxFrameIovecs) {
    iovecs_.clear();
    direct = skip;
  }
  if (direct < kBufferSize) {
    iovecs_.push_back({buffer() + direct, kBufferSize - direct});
  }
  const NetReceived got = backend_.receive(pair_, iovecs_);
  switch (got.status) {
    case NetIo::kDone:
      break;
    case NetIo::kAgain:
      return Step::kIdle;
    case NetIo::kDropped:
      ++counters_.rx_dropped;
      return Step::kFrame;
    case NetIo::kClosed:
      return Step::kOver;
  }
  const std::size_t size = got.size + skip;
  if (size < kVnetHeaderSize + kMinFrameSize) {
    ++counters_.rx_dropped;
    return Step::kFrame;
  }
  rx_target_ = size > kSmallFrame ? kBufferSize : kSmallFrame;
  static constexpr std::array<std::uint8_t, kVnetHeaderSize> kNoHeader{};
  if (size > direct && !prefetch(size)) {
    if (rx_->broken()) {
      return Step::kOver;
    }
    if (!negotiated_.mergeable) {
      ++counters_.rx_dropped;
      return Step::kFrame;
    }
    // Too few buffers: gather the frame and wait for more.
    iovecs_.pop_back();
    copy_from_iovecs(iovecs_, 0, std::span(buffer_.get() + skip, direct - skip));
    if (skip > 0) {
      std::ranges::copy(kNoHeader, buffer_.get());
    }
    held_size_ = size;
    return Step::kFrame;
  }
  if (skip > 0) {
    write_scattered(0, kNoHeader);
  }
  if (size > direct) {
    write_scattered(direct, std::span(buffer_.get() + direct, size - direct));
  }
  push_frame(size);
  return Step::kFrame;
}

// --- transmitting ---

void NetQueuePair::process_tx() {
  if (!tx_ || tx_->broken() || held_still_) {
    return;
  }
  tx_blocked_ = false;
  tx_->disable_notifications();
  const std::uint64_t bytes_before = counters_.tx_bytes;
  for (int frames = 0;; ++frames) {
    if (frames == kFramesPerCall || counters_.tx_bytes - bytes_before >= kBytesPerCall) {
      signal_eventfd(tx_kick_);
      break;
    }
    const PopResult popped = tx_->pop(tx_chain_);
    if (popped == PopResult::kEmpty) {
      if (!tx_->enable_notifications()) {
        break;
      }
      tx_->disable_notifications();
      continue;
    }
    if (popped == PopResult::kBroken) {
      break;
    }
    const NetIo sent = closed_ || !link_up_ ? NetIo::kDropped : transmit(tx_chain_);
    if (sent == NetIo::kAgain) {
      tx_->undo_pop(tx_chain_);
      tx_blocked_ = true;
      break;
    }
    if (sent == NetIo::kDone) {
      ++counters_.tx_frames;
      counters_.tx_bytes += tx_chain_.readable_size() - kVnetHeaderSize;
    } else {
      ++counters_.tx_dropped;
    }
    tx_->push(tx_chain_, 0);
    if (sent == NetIo::kClosed) {
      closed();
    }
  }
  if (!closed_) {
    const NetIo flushed = backend_.flush(pair_);
    tx_blocked_ = tx_blocked_ || flushed == NetIo::kAgain;
    if (flushed == NetIo::kClosed) {
      closed();
    }
  }
  if (tx_->take_interrupt_wish()) {
    interrupts_->queue_used(static_cast<std::uint16_t>(2 * pair_ + 1));
  }
  if (tx_->broken()) {
    broken(false);
  } else {
    update_watch();
  }
}

NetIo NetQueuePair::transmit(const DescriptorChain& chain) {
  const std::size_t size = chain.readable_size();
  if (size < kVnetHeaderSize + kMinFrameSize || size > kBufferSize) {
    return NetIo::kDropped;
  }
  std::array<std::uint8_t, kVnetHeaderSize> bytes;
  chain.read(0, bytes);
  VirtioNetHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  // Only what was negotiated (5.1.6.2.1); the lengths are judged by the kernel, which parses the frame.
  header.flags &= kNetHeaderNeedsChecksum;
  header.buffer_count = 0;
  const NetOffloads& may = negotiated_.transmit;
  const std::uint8_t type = header.gso_type & static_cast<std::uint8_t>(~kNetGsoEcn);
  const bool type_ok = type == kNetGsoNone || (type == kNetGsoTcp4 && may.tso4) ||
                       (type == kNetGsoTcp6 && may.tso6) || (type == kNetGsoUdp && may.ufo);
  const bool ecn = (header.gso_type & kNetGsoEcn) != 0;
  if (!type_ok || (ecn && !may.ecn) || (header.flags != 0 && !may.checksum)) {
    return NetIo::kDropped;
  }
  iovecs_.clear();
  if (backend_.has_vnet_header()) {
    std::memcpy(bytes.data(), &header, sizeof header);
    iovecs_.push_back({bytes.data(), bytes.size()});
  }
  const std::size_t frame_size = size - kVnetHeaderSize;
  chain.readable_iovecs(kVnetHeaderSize, frame_size, iovecs_);
  if (iovecs_.size() > kMaxFrameIovecs) {
    if (tx_buffer_ == nullptr) {
      tx_buffer_ = std::make_unique_for_overwrite<std::uint8_t[]>(kMaxFrameSize);
    }
    chain.read(kVnetHeaderSize, std::span(tx_buffer_.get(), frame_size));
    iovecs_.resize(backend_.has_vnet_header() ? 1 : 0);
    iovecs_.push_back({tx_buffer_.get(), frame_size});
  }
  return backend_.send(pair_, iovecs_);
}

}  // namespace wisp
