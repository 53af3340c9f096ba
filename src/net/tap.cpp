#include "net/tap.h"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace wisp {
namespace {

constexpr const char* kTunPath = "/dev/net/tun";

unsigned int offload_bits(const NetOffloads& offloads) {
  unsigned int bits = 0;
  if (offloads.checksum) {
    bits |= TUN_F_CSUM;
    bits |= offloads.tso4 ? TUN_F_TSO4 : 0U;
    bits |= offloads.tso6 ? TUN_F_TSO6 : 0U;
    bits |= offloads.ecn && (offloads.tso4 || offloads.tso6) ? TUN_F_TSO_ECN : 0U;
    bits |= offloads.ufo ? TUN_F_UFO : 0U;
  }
  return bits;
}

Result<void> check_name(const std::string& name) {
  if (name.empty() || name.size() >= IFNAMSIZ) {
    return fail("interface name '{}' has {} bytes, expected 1 to {}", name, name.size(), IFNAMSIZ - 1);
  }
  // As the kernel's dev_valid_name(); a '%' would make it invent a name.
  const bool bad =
      name == "." || name == ".." || std::ranges::any_of(name, [](char c) {
        return c == '/' || c == ':' || c == '%' || static_cast<unsigned char>(c) <= ' ' || c == '\x7f';
      });
  if (bad) {
    return fail("'{}' is not an interface name", name);
  }
  return {};
}

std::unexpected<Error> attach_error(int error_number, const std::string& name, bool exists,
                                    std::uint16_t queues) {
  switch (error_number) {
    case EPERM:
      if (exists) {
        return fail(
            "no permission for the interface {}: have its owner changed by root "
            "(ip tuntap add {} mode tap user NAME) or pass it by fd=",
            name, name);
      }
      return fail(
          "interface {} does not exist and this user may not create it: "
          "run as root: ip tuntap add {} mode tap user $USER",
          name, name);
    case EBUSY:
      return fail("interface {} is in use by another program", name);
    case EINVAL:
      if (exists && queues > 1) {
        return fail(
            "interface {} exists and is no tap interface with several queues: use queues=1, or create "
            "it with: ip tuntap add {} mode tap multi_queue",
            name, name);
      }
      if (exists) {
        return fail("interface {} exists and is no tap interface", name);
      }
      [[fallthrough]];
    default:
      return fail_errno(error_number, "cannot attach to the interface {}", name);
  }
}

// Sets IFF_UP; a new interface is down, and what is sent to it would be refused.
Result<void> bring_up(const std::string& name) {
  // Any socket does for the ioctls of interfaces; the system-call filter lets through this kind.
  const UniqueFd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request{};
  name.copy(request.ifr_name, IFNAMSIZ - 1);
  if (::ioctl(socket.get(), SIOCGIFFLAGS, &request) != 0) {
    return fail_errno(errno, "cannot read the flags of the interface {}", name);
  }
  request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
  if (::ioctl(socket.get(), SIOCSIFFLAGS, &request) != 0) {
    return fail_errno(errno, "cannot bring up the interface {}", name);
  }
  return {};
}

}  // namespace

TapBackend::TapBackend(std::vector<UniqueFd> fds, std::string name, bool vnet_header, bool multi_queue)
    : fds_(std::move(fds)),
      name_(std::move(name)),
      vnet_header_(vnet_header),
      multi_queue_(multi_queue),
      active_pairs_(static_cast<std::uint16_t>(fds_.size())) {}

Result<std::unique_ptr<TapBackend>> TapBackend::open(const std::string& name, std::uint16_t queues) {
  WISP_TRY(check_name(name));
  if (queues == 0 || queues > kMaxTapQueues) {
    return fail("queues={} is out of range, expected 1 to {}", queues, kMaxTapQueues);
  }
  const bool existed = ::if_nametoindex(name.c_str()) != 0;
  std::vector<UniqueFd> fds;
  bool multi_queue = queues > 1;
  while (fds.size() < queues) {
    UniqueFd fd(::open(kTunPath, O_RDWR | O_NONBLOCK | O_CLOEXEC));
    if (!fd.valid()) {
      const char* advice = errno == ENOENT   ? " (load the module: modprobe tun)"
                           : errno == EACCES ? " (run as root, or pass a tap by fd=)"
                                             : "";
      return fail_errno(errno, "cannot open {}{}", kTunPath, advice);
    }
    ifreq request{};
    name.copy(request.ifr_name, IFNAMSIZ - 1);
    const auto flags = static_cast<short>(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    request.ifr_flags = static_cast<short>(multi_queue ? flags | IFF_MULTI_QUEUE : flags);
    int result = ::ioctl(fd.get(), TUNSETIFF, &request);
    if (result != 0 && errno == EINVAL && queues == 1 && existed) {
      // An interface made for several queues wants to hear so even from a user of one.
      multi_queue = true;
      request.ifr_flags = static_cast<short>(flags | IFF_MULTI_QUEUE);
      result = ::ioctl(fd.get(), TUNSETIFF, &request);
    }
    if (result != 0) {
      return attach_error(errno, name, existed, queues);
    }
    fds.push_back(std::move(fd));
  }
  std::unique_ptr<TapBackend> tap(new TapBackend(std::move(fds), name, true, multi_queue));
  WISP_TRY(tap->prepare());
  if (!existed) {
    WISP_TRY(bring_up(name));
  }
  return tap;
}

Result<std::unique_ptr<TapBackend>> TapBackend::from_fds(std::vector<UniqueFd> fds) {
  if (fds.empty() || fds.size() > kMaxTapQueues) {
    return fail("{} tap descriptors were given, expected 1 to {}", fds.size(), kMaxTapQueues);
  }
  std::string name;
  int flags = 0;
  for (std::size_t i = 0; i < fds.size(); ++i) {
    const int fd = fds[i].get();
    ifreq request{};
    if (::ioctl(fd, TUNGETIFF, &request) != 0) {
      if (errno == EBADFD) {
        return fail("fd {} is {} without an interface attached to it", fd, kTunPath);
      }
      return fail_errno(errno, "fd {} is not a tap interface", fd);
    }
    const int found = request.ifr_flags & 0xffff;
    const std::string found_name(request.ifr_name, ::strnlen(request.ifr_name, IFNAMSIZ));
    if ((found & IFF_TAP) == 0) {
      return fail("fd {} is the interface {} in tun mode, expected tap mode", fd, found_name);
    }
    if (i == 0) {
      name = found_name;
      flags = found;
    } else if (found_name != name) {
      return fail("fds= names two interfaces, {} and {}: all must be queues of one", name, found_name);
    } else if (((found ^ flags) & IFF_VNET_HDR) != 0) {
      return fail("fds= has descriptors of {} with and without IFF_VNET_HDR: all must be alike", name);
    }
    const int status = ::fcntl(fd, F_GETFL);
    if (status < 0 || ::fcntl(fd, F_SETFL, status | O_NONBLOCK) != 0 ||
        ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
      return fail_errno(errno, "cannot make fd {} non-blocking", fd);
    }
  }
  const bool vnet_header = (flags & IFF_VNET_HDR) != 0;
  const bool multi_queue = (flags & IFF_MULTI_QUEUE) != 0;
  std::unique_ptr<TapBackend> tap(new TapBackend(std::move(fds), std::move(name), vnet_header, multi_queue));
  WISP_TRY(tap->prepare());
  return tap;
}

Result<void> TapBackend::prepare() {
  if (!vnet_header_) {
    return {};
  }
  for (const UniqueFd& fd : fds_) {
    int size = static_cast<int>(kVnetHeaderSize);
    if (::ioctl(fd.get(), TUNSETVNETHDRSZ, &size) != 0) {
      return fail_errno(errno, "cannot set the header size of {}", description());
    }
  }
  // The widest set first; nothing is on until the driver asked for it.
  for (const NetOffloads candidate :
       {NetOffloads{true, true, true, true, true}, NetOffloads{true, true, true, true, false},
        NetOffloads{.checksum = true}}) {
    if (::ioctl(fds_[0].get(), TUNSETOFFLOAD, static_cast<unsigned long>(offload_bits(candidate))) == 0) {
      offloads_ = candidate;
      break;
    }
  }
  return set_offloads({});
}

Result<void> TapBackend::set_offloads(const NetOffloads& offloads) {
  if (!vnet_header_) {
    return NetBackend::set_offloads(offloads);
  }
  // An attribute of the interface, not of the queue.
  if (::ioctl(fds_[0].get(), TUNSETOFFLOAD, static_cast<unsigned long>(offload_bits(offloads))) != 0) {
    return fail_errno(errno, "cannot set the offloads of {}", description());
  }
  return {};
}

Result<void> TapBackend::set_active_pairs(std::uint16_t pairs) {
  WISP_ASSERT(pairs >= 1 && pairs <= fds_.size());
  if (!multi_queue_ || fds_.size() == 1) {
    return {};
  }
  for (; active_pairs_ < pairs; ++active_pairs_) {
    ifreq request{};
    request.ifr_flags = static_cast<short>(IFF_ATTACH_QUEUE);
    if (::ioctl(fds_[active_pairs_].get(), TUNSETQUEUE, &request) != 0) {
      return fail_errno(errno, "cannot switch on queue {} of {}", active_pairs_, description());
    }
  }
  for (; active_pairs_ > pairs; --active_pairs_) {
    ifreq request{};
    request.ifr_flags = static_cast<short>(IFF_DETACH_QUEUE);
    if (::ioctl(fds_[active_pairs_ - 1U].get(), TUNSETQUEUE, &request) != 0) {
      return fail_errno(errno, "cannot switch off queue {} of {}", active_pairs_ - 1, description());
    }
  }
  return {};
}

NetIo TapBackend::send(std::uint16_t pair, std::span<const iovec> frame) {
  if (::writev(fds_[pair].get(), frame.data(), static_cast<int>(frame.size())) >= 0) {
    return NetIo::kDone;
  }
  switch (errno) {
    case EAGAIN:
    case EINTR:
      return NetIo::kAgain;
    case EBADFD:
    case ENODEV:
      return NetIo::kClosed;
    default:  // a header that lies, an interface that is down, no memory
      return NetIo::kDropped;
  }
}

NetReceived TapBackend::receive(std::uint16_t pair, std::span<const iovec> buffers) {
  const ssize_t size = ::readv(fds_[pair].get(), buffers.data(), static_cast<int>(buffers.size()));
  if (size > 0) {
    return {NetIo::kDone, static_cast<std::size_t>(size)};
  }
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
    return {NetIo::kAgain, 0};
  }
  return {NetIo::kClosed, 0};
}

}  // namespace wisp
