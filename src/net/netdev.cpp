#include "net/netdev.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "net/dgram_backend.h"
#include "net/stream_net_backend.h"
#include "net/tap.h"

namespace wisp {
namespace {

constexpr std::array kTapSpecs{
    PropertySpec{
        .name = "ifname", .help = "tap interface; created where it does not exist and we may", .maximum = 15},
    PropertySpec{.name = "fd", .help = "descriptor of an opened tap, in place of ifname"},
    PropertySpec{.name = "fds", .help = "descriptors of the queues of one opened tap, as 3:4"},
    PropertySpec{.name = "queues",
                 .kind = PropertyKind::kUint,
                 .help = "queue pairs of a tap named by ifname",
                 .default_text = "1",
                 .minimum = 1,
                 .maximum = kMaxTapQueues},
    PropertySpec{.name = "vhost",
                 .kind = PropertyKind::kBool,
                 .help = "let the kernel move the frames (/dev/vhost-net)",
                 .default_text = "off"},
    PropertySpec{.name = "vhostfd", .help = "descriptor of an opened /dev/vhost-net"},
    PropertySpec{.name = "vhostfds", .help = "descriptors of opened /dev/vhost-net, one per queue pair"},
    PropertySpec{.name = "script",
                 .help = "none is run",
                 .default_text = "no",
                 .ignored_because = "no script is run: set the interface up beforehand"},
    PropertySpec{.name = "downscript",
                 .help = "none is run",
                 .default_text = "no",
                 .ignored_because = "no script is run: set the interface up beforehand"},
};
constexpr std::array kPasstSpecs{
    PropertySpec{.name = "path", .help = "the passt program", .default_text = "passt, found in PATH"},
    PropertySpec{
        .name = "hostfwd",
        .help = "a port of the host that leads to the guest: tcp::2222-:22; may be given several times",
        .joined_by = ";"},
    PropertySpec{.name = "mtu",
                 .kind = PropertyKind::kUint,
                 .help = "MTU told to the guest",
                 .default_text = "65520",
                 .minimum = 1280,
                 .maximum = 65520},
    PropertySpec{.name = "ipv4", .kind = PropertyKind::kBool, .help = "serve IPv4", .default_text = "on"},
    PropertySpec{.name = "ipv6", .kind = PropertyKind::kBool, .help = "serve IPv6", .default_text = "on"},
};
constexpr std::array kStreamSpecs{
    PropertySpec{.name = "path", .help = "listening Unix socket to connect to"},
    PropertySpec{.name = "fd", .help = "descriptor of a connected stream socket, in place of path"},
};
constexpr std::array kDgramSpecs{
    PropertySpec{.name = "fd", .help = "descriptor of a connected datagram socket"},
};

// The descriptors that `text`, the value of `option`, names.
Result<std::vector<int>> fds_in(std::string_view option, std::string_view text) {
  auto fds = parse_fds(text);
  return fds ? std::move(fds) : fail("option '{}': {}", option, fds.error().message);
}

// The descriptors of the option `one` or `many`.
Result<std::vector<int>> fds_of(const PropertySet& properties, std::string_view one, std::string_view many) {
  if (!many.empty() && properties.has(one) && properties.has(many)) {
    return fail("{}= and {}= cannot both be given", one, many);
  }
  if (const auto text = properties.find_string(one)) {
    WISP_ASSIGN(auto fds, fds_in(one, *text));
    if (fds.size() != 1) {
      return fail("{}={} has more than one descriptor{}", one, *text,
                  many.empty() ? "" : fmt::format(" (use {}=)", many));
    }
    return fds;
  }
  const auto text = many.empty() ? std::nullopt : properties.find_string(many);
  return text ? fds_in(many, *text) : std::vector<int>{};
}

Result<void> parse_tap(NetdevConfig& config, const PropertySet& properties) {
  if (config.fds.empty()) {
    WISP_ASSIGN(config.fds, fds_of(properties, "fd", "fds"));
  }
  WISP_ASSIGN(config.vhost_fds, fds_of(properties, "vhostfd", "vhostfds"));
  config.ifname = properties.get_string("ifname");
  config.queues = static_cast<std::uint16_t>(properties.get_uint("queues", 1));
  config.vhost = properties.get_bool("vhost", !config.vhost_fds.empty());
  if (config.fds.empty() == config.ifname.empty()) {
    return fail("give either ifname= (a tap interface) or fd= (an opened one)");
  }
  if (!config.fds.empty()) {
    if (config.fds.size() > kMaxTapQueues) {
      return fail("fds= names {} descriptors, at most {} are possible", config.fds.size(), kMaxTapQueues);
    }
    if (properties.has("queues") && config.queues != config.fds.size()) {
      return fail("queues={} does not match the {} descriptors given", config.queues, config.fds.size());
    }
    config.queues = static_cast<std::uint16_t>(config.fds.size());
  }
  if (!config.vhost_fds.empty() && !config.vhost) {
    return fail("vhostfd= needs vhost=on");
  }
  if (!config.vhost_fds.empty() && config.vhost_fds.size() != config.queues) {
    return fail("{} vhost descriptors were given for {} queue pairs", config.vhost_fds.size(), config.queues);
  }
  return {};
}

Result<UniqueFd> open_vhost_net() {
  UniqueFd fd(::open("/dev/vhost-net", O_RDWR | O_CLOEXEC));
  if (!fd.valid()) {
    return fail_errno(errno,
                      "cannot open /dev/vhost-net (load the module: modprobe vhost_net, or use vhost=off)");
  }
  return fd;
}

}  // namespace

constinit const std::span<const PropertySpec> kTapProperties = kTapSpecs;
constinit const std::span<const PropertySpec> kPasstProperties = kPasstSpecs;
constinit const std::span<const PropertySpec> kStreamProperties = kStreamSpecs;
constinit const std::span<const PropertySpec> kDgramProperties = kDgramSpecs;

Result<NetdevConfig> parse_netdev(std::string_view kind, std::string id, const PropertySet& properties,
                                  std::vector<int> fds) {
  NetdevConfig config;
  const std::string context = "netdev " + id;
  config.id = std::move(id);
  config.fds = std::move(fds);
  Result<void> checked;
  if (kind == "tap") {
    config.kind = NetdevKind::kTap;
    checked = parse_tap(config, properties);
  } else if (kind == "passt" || kind == "user") {
    config.kind = NetdevKind::kPasst;
    config.passt.program = properties.get_string("path", config.passt.program);
    config.passt.mtu = static_cast<std::uint32_t>(properties.get_uint("mtu", 0));
    config.passt.ipv4 = properties.get_bool("ipv4", true);
    config.passt.ipv6 = properties.get_bool("ipv6", true);
    auto forwards = parse_port_forwards(properties.get_string("hostfwd"));
    if (!forwards) {
      checked = std::unexpected(std::move(forwards).error());
    } else if (!config.passt.ipv4 && !config.passt.ipv6) {
      checked = fail("ipv4=off and ipv6=off leave nothing to serve");
    } else if (!config.fds.empty()) {
      checked = fail("{} takes no descriptor (use -netdev stream,fd= for a passt that runs already)", kind);
    } else {
      config.passt.forwards = *std::move(forwards);
    }
  } else if (kind == "stream" || kind == "dgram") {
    config.kind = kind == "stream" ? NetdevKind::kStream : NetdevKind::kDgram;
    config.path = properties.get_string("path");
    if (config.fds.empty()) {
      auto parsed = fds_of(properties, "fd", {});
      if (!parsed) {
        return with_context(context, parsed.error());
      }
      config.fds = *std::move(parsed);
    }
    if (config.fds.size() > 1) {
      checked = fail("{} takes one descriptor, not {}", kind, config.fds.size());
    } else if (config.fds.empty() == config.path.empty()) {
      checked = kind == "stream"
                    ? fail("give either path= (a listening Unix socket) or fd= (a connected one)")
                    : fail("give fd= (a connected datagram socket)");
    }
  } else {
    checked = fail("kind '{}' is not one of tap, passt, user, stream, dgram", kind);
  }
  if (!checked) {
    return with_context(context, checked.error());
  }
  return config;
}

Result<Netdev> open_netdev(const NetdevConfig& config) {
  const std::string context = "netdev " + config.id;
  std::vector<UniqueFd> fds;
  fds.reserve(config.fds.size());
  for (const int fd : config.fds) {
    fds.emplace_back(fd);
  }
  Netdev netdev;
  for (const int fd : config.vhost_fds) {
    (void)::fcntl(fd, F_SETFD, FD_CLOEXEC);
    netdev.vhost_fds.emplace_back(fd);
  }
  const auto take = [&netdev](auto opened) -> Result<void> {
    WISP_ASSIGN(netdev.backend, std::move(opened));
    return {};
  };
  Result<void> opened;
  switch (config.kind) {
    case NetdevKind::kTap:
      opened = fds.empty() ? take(TapBackend::open(config.ifname, config.queues))
                           : take(TapBackend::from_fds(std::move(fds)));
      break;
    case NetdevKind::kPasst:
      opened = take(PasstBackend::start(config.passt));
      break;
    case NetdevKind::kStream:
      opened = fds.empty() ? take(StreamNetBackend::connect(config.path))
                           : take(StreamNetBackend::create(std::move(fds[0]), "stream socket"));
      break;
    case NetdevKind::kDgram:
      opened = fds.empty() ? fail("no descriptor was given") : take(DgramBackend::create(std::move(fds[0])));
      break;
  }
  if (!opened) {
    return with_context(context, opened.error());
  }
  if (config.vhost && !netdev.backend->has_vnet_header()) {
    return fail("{}: vhost=on needs a tap opened with IFF_VNET_HDR", context);
  }
  while (config.vhost && netdev.vhost_fds.size() < netdev.backend->queue_pairs()) {
    auto fd = open_vhost_net();
    if (!fd) {
      return with_context(context, fd.error());
    }
    netdev.vhost_fds.push_back(*std::move(fd));
  }
  return netdev;
}

}  // namespace wisp
