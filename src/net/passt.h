// Rootless networking through passt(1): a helper program that turns the guest's frames into sockets of the
// user who runs it. The guest gets addresses by DHCP, DHCPv6 or NDP, as the host has them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "net/child_process.h"
#include "net/net_backend.h"
#include "net/stream_net_backend.h"

namespace wisp {

// A port of the host whose connections (or datagrams) go to the guest.
struct PortForward {
  bool udp = false;
  std::string host_address;  // empty: all addresses of the host
  std::uint16_t host_port = 0;
  std::uint16_t guest_port = 0;
  bool operator==(const PortForward&) const = default;
};

// QEMU's form "[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport"; several with ';' between them. An IPv6
// host address stands in brackets. passt knows one guest address, so that none can be named here.
[[nodiscard]] Result<std::vector<PortForward>> parse_port_forwards(std::string_view text);

struct PasstOptions {
  std::string program = "passt";
  std::vector<PortForward> forwards{};
  std::uint32_t mtu = 0;  // told to the guest; 0: passt's own choice
  bool ipv4 = true;
  bool ipv6 = true;
};

class PasstBackend final : public NetBackend {
 public:
  // Starts passt and waits (about 20 ms) until it serves, so that what it complains of is an error here.
  [[nodiscard]] static Result<std::unique_ptr<PasstBackend>> start(const PasstOptions& options);

  [[nodiscard]] NetIo send(std::uint16_t pair, std::span<const iovec> frame) override;
  [[nodiscard]] NetIo flush(std::uint16_t pair) override { return stream_->flush(pair); }
  [[nodiscard]] NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) override;
  [[nodiscard]] int poll_fd(std::uint16_t pair) const override { return stream_->poll_fd(pair); }
  [[nodiscard]] std::string description() const override;
  [[nodiscard]] std::string failure() override;
  [[nodiscard]] pid_t pid() const { return child_->pid(); }

 private:
  PasstBackend(std::unique_ptr<ChildProcess> child, std::unique_ptr<StreamNetBackend> stream, UniqueFd errors)
      : errors_(std::move(errors)), stream_(std::move(stream)), child_(std::move(child)) {}
  [[nodiscard]] Result<void> wait_until_ready();
  // What passt wrote to its standard error, without noise, in one line.
  [[nodiscard]] std::string complaints();

  const UniqueFd errors_;
  const std::unique_ptr<StreamNetBackend> stream_;
  const std::unique_ptr<ChildProcess> child_;
};

}  // namespace wisp
