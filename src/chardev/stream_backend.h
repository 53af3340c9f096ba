// What all back ends over file descriptors have in common: the bounded output buffer, flow control of the
// input, and the rule that everything that touches a descriptor happens on the loop's thread.
//
// A write only fills the buffer and sets a timer; the loop writes what has gathered. So a vCPU that prints
// byte by byte pays one system call for many bytes and never waits for a terminal, and the many become few
// writes.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/event_loop.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "chardev/byte_ring.h"
#include "chardev/char_backend.h"
#include "chardev/escape_filter.h"

namespace wisp {

class StreamBackend : public CharBackend {
 public:
  static constexpr std::size_t kOutputSize = 64 << 10;
  // How long output may gather.
  static constexpr std::uint64_t kGatherNs = 500'000;

  StreamBackend(const StreamBackend&) = delete;
  StreamBackend& operator=(const StreamBackend&) = delete;

  std::size_t write(std::span<const std::uint8_t> bytes) override;
  void set_receiver(CharReceiver* receiver) override;
  void resume_input() override;
  [[nodiscard]] bool is_connected() const override;
  void refresh_size() override;

 protected:
  StreamBackend(EventLoop& loop, Log& log, std::string id);

  // To be called first by the factory of a derived class.
  [[nodiscard]] Result<void> start();
  // To be called first by the destructor of a derived class, which then stops its own watches in `stop_own`.
  // Ends all callbacks, then gives what is still in the buffer a moment to go out.
  template <typename StopOwn>
  void shut_down(const StopOwn& stop_own) {
    {
      const std::lock_guard lock(loop_mutex_);
      stop_watches();
      stop_own();
    }
    flush_finally();
  }
  void shut_down() {
    shut_down([] {});
  }

  // A peer is there, from a callback of this back end. `in` or `out` may be without descriptor (nothing to
  // read; nothing to write to). Both are non-blocking or never block.
  void attach(UniqueFd in, UniqueFd out);
  // The same, from the factory of a derived class.
  void attach_first(UniqueFd in, UniqueFd out);
  // The peer has gone: closes both, drops the output, tells the receiver. From a callback.
  void detach();

  // After detach(), on the loop's thread: wait for the next peer.
  virtual void peer_gone() = 0;
  // Whether the end of the input, or output that nobody takes, means that the peer has gone.
  [[nodiscard]] virtual bool end_of_input_is_end_of_peer() const { return true; }

  // A watch or timer whose callback holds loop_mutex_ and counts as a callback of this back end.
  [[nodiscard]] Result<Watch> watch(int fd, std::uint32_t events, EventLoop::Callback callback);
  [[nodiscard]] Result<Timer> timer(std::function<void()> callback);

  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] Log& log() { return log_; }
  [[nodiscard]] EventLoop& loop() { return loop_; }
  // On the loop's thread.
  [[nodiscard]] CharReceiver* receiver() { return receiver_; }
  void set_escape_filter(std::unique_ptr<EscapeFilter> filter) { escape_ = std::move(filter); }

 private:
  static constexpr std::size_t kReadSize = 4096;
  static constexpr std::size_t kReadsPerTurn = 16;  // then other descriptors have their turn

  // All of these on the loop's thread with loop_mutex_ held.
  void turn();
  void read_input();
  void input_ended();
  void end_unheard();
  void deliver(std::span<const std::uint8_t> bytes);
  void watch_input();
  void input_event(std::uint32_t events);
  void write_output();
  void resume_if_output_waits();
  void wait_for_room(bool wanted);
  void tell_writable();
  void tell_size();

  // Makes turn() run soon; from any thread.
  void kick(std::uint64_t delay_ns);
  enum class Written : std::uint8_t { kSome, kNothingLeft, kNoRoom, kFailed };
  // Writes one chunk of the buffer. kFailed leaves errno.
  [[nodiscard]] Written write_chunk();
  void output_failed(int error);
  void drop_output();
  void stop_watches();
  void flush_finally();

  EventLoop& loop_;
  Log& log_;
  const std::string id_;

  // Held during each callback; guards what follows up to state_mutex_.
  std::mutex loop_mutex_;
  std::atomic<std::thread::id> callback_thread_{};
  CharReceiver* receiver_ = nullptr;
  UniqueFd in_;
  UniqueFd out_;
  Watch in_watch_;
  Watch out_watch_;
  Timer kick_timer_;
  bool in_wanted_ = false;   // what in_watch_ waits for
  bool in_pollable_ = true;  // false: a regular file, always readable
  bool hung_up_ = false;     // the peer has gone, but its last bytes may wait in in_
  bool out_is_socket_ = false;
  std::unique_ptr<EscapeFilter> escape_;
  std::vector<std::uint8_t> filtered_;
  std::pair<std::uint16_t, std::uint16_t> told_size_{};
  std::atomic<bool> look_at_size_ = false;

  mutable std::mutex state_mutex_;  // innermost; never held during a callback, read or write
  ByteRing output_{kOutputSize};
  bool connected_ = false;
  bool owes_writable_ = false;
  bool kicked_ = false;
  bool kicked_at_once_ = false;
};

}  // namespace wisp
