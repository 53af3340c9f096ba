// Streams of the guest's vsock, served to Unix sockets of the host.
//
// The guest connects to port P of the host (CID 2): Wisp connects to the Unix socket "PATH_P".
// A program of the host connects to the Unix socket PATH and writes "CONNECT P\n": Wisp connects to port P of
// the guest, answers "OK N\n" (N is the port that the guest sees), and from then on bytes flow.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "virtio/queue.h"
#include "virtio/vsock_connection.h"
#include "virtio/vsock_listener.h"
#include "virtio/vsock_packet.h"

namespace wisp {

// Not thread-safe: under the device's lock.
class VsockMux final : private VsockListenerOwner {
 public:
  // Streams and half-open handshakes together.
  static constexpr std::size_t kMaxConnections = 1024;
  // Listens at PATH (see VsockListener). `on_output` is called when something for the guest came up outside
  // of handle().
  [[nodiscard]] static Result<std::unique_ptr<VsockMux>> create(Strand& strand, const Clock& clock,
                                                                std::uint64_t guest_cid, std::string path,
                                                                std::function<void()> on_output);
  VsockMux(const VsockMux&) = delete;
  VsockMux& operator=(const VsockMux&) = delete;
  ~VsockMux() override;

  // The guest's driver is there; host programs are served from now on.
  void start();
  // Cuts all streams, silently. Host programs that connect wait for the next start().
  void stop();
  // Stills everything, and takes it up again.
  void hold();
  void unhold();

  // Whether handle() may be called: not while the guest leaves too many answers unread.
  [[nodiscard]] bool can_handle() const { return strays_.size() < kMaxStrays; }
  // A packet of the guest, whose payload stands behind the header in the readable part; header.length was
  // checked against its size.
  void handle(const VsockHeader& header, const DescriptorChain& chain);

  // Whether produce() may have something.
  [[nodiscard]] bool has_output() const { return !strays_.empty() || !ready_.empty(); }
  // Writes the next packet to the guest into the writable part, which holds kVsockHeaderSize at least;
  // returns its size, 0 where there is none after all.
  [[nodiscard]] std::uint32_t produce(const DescriptorChain& chain);

  // The guest has no buffers: what waits for some is not watched until then.
  void settle();

  [[nodiscard]] std::size_t connection_count() const {
    return connections_.size() + listener_->handshake_count();
  }

 private:
  using Connection = VsockConnection;
  // Answers to packets of no connection, kept until the guest has buffers.
  static constexpr std::size_t kMaxStrays = 256;

  VsockMux(Strand& strand, const Clock& clock, std::uint64_t guest_cid, std::string path,
           std::function<void()> on_output);
  void host_connected(UniqueFd socket, std::uint32_t guest_port) override;
  void tick_wanted() override { arm_timer(); }
  void update_listener();
  void connect_host(const VsockHeader& header);
  [[nodiscard]] std::uint32_t free_host_port(std::uint32_t guest_port);

  Connection* add(std::uint32_t host_port, std::uint32_t guest_port, UniqueFd socket,
                  Connection::State state);
  void remove(Connection& connection);
  // Ends the stream for both sides.
  void kill(Connection& connection);
  void answer_rst(const VsockHeader& header);
  void handle_established(Connection& connection, const VsockHeader& header, const DescriptorChain& chain);
  void on_guest_shutdown(Connection& connection, std::uint32_t flags);
  void on_host_gone(Connection& connection);
  void finish_output(Connection& connection);
  void after_write(Connection& connection, Connection::Written written);
  void begin_closing(Connection& connection);
  void drain(Connection& connection);

  // Puts it among those that have something for the guest, where it has.
  void schedule(Connection& connection);
  [[nodiscard]] bool has_something(const Connection& connection) const;
  [[nodiscard]] std::uint32_t produce_from(Connection& connection, const DescriptorChain& chain);
  [[nodiscard]] std::uint32_t produce_data(Connection& connection, const DescriptorChain& chain);
  void update_watch(Connection& connection);
  void on_ready(std::uint64_t id, std::uint32_t events);
  void arm_timer();
  void on_timer();

  Strand& strand_;
  const Clock& clock_;
  const std::uint64_t guest_cid_;
  const std::string path_;
  const std::function<void()> on_output_;
  std::unique_ptr<VsockListener> listener_;
  bool started_ = false;
  bool held_ = false;
  Timer timer_;
  bool timer_armed_ = false;
  std::uint64_t next_id_ = 1;
  std::uint32_t next_host_port_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Connection>> connections_;  // by id
  std::unordered_map<std::uint64_t, Connection*> by_ports_;                     // all but the draining
  // Each connection has one node, in one of these.
  std::list<Connection*> ready_;
  std::list<Connection*> idle_;
  std::deque<VsockHeader> strays_;
  std::vector<iovec> iovecs_;
};

}  // namespace wisp
