// What -netdev and netdev_add name: options, their check, and the opened back end.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/property.h"
#include "base/unique_fd.h"
#include "net/net_backend.h"
#include "net/passt.h"

namespace wisp {

enum class NetdevKind : std::uint8_t {
  kTap,     // "tap"
  kPasst,   // "passt" or "user"
  kStream,  // "stream": length-prefixed frames over a stream socket
  kDgram,   // "dgram": frames as datagrams
};

struct NetdevConfig {
  NetdevKind kind = NetdevKind::kTap;
  std::string id{};
  std::string ifname{};          // tap
  std::vector<int> fds{};        // tap, stream, dgram: taken over by open_netdev()
  std::uint16_t queues = 1;      // tap by name: queue pairs
  bool vhost = false;            // tap: let the kernel's vhost-net move the frames
  std::vector<int> vhost_fds{};  // opened /dev/vhost-net, one per queue pair; taken over by open_netdev()
  std::string path{};            // stream: a listening Unix socket
  PasstOptions passt{};
};

// Options of each kind. `fd`, `fds`, `vhostfd` and `vhostfds` hold descriptor numbers ("3", "3:4").
extern const std::span<const PropertySpec> kTapProperties;
extern const std::span<const PropertySpec> kPasstProperties;
extern const std::span<const PropertySpec> kStreamProperties;
extern const std::span<const PropertySpec> kDgramProperties;

// `kind` as in -netdev; `fds` are descriptors that came by QMP getfd, in place of fd= or fds=. Nothing is
// opened or taken over yet.
[[nodiscard]] Result<NetdevConfig> parse_netdev(std::string_view kind, std::string id,
                                                const PropertySet& properties, std::vector<int> fds = {});

struct Netdev {
  std::unique_ptr<NetBackend> backend;
  std::vector<UniqueFd> vhost_fds;  // one per queue pair where vhost is on, else empty
};

// Opens what the configuration names. The descriptors it lists are taken over, on failure too.
[[nodiscard]] Result<Netdev> open_netdev(const NetdevConfig& config);

}  // namespace wisp
