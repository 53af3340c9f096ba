#include "chardev/socket_backend.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <memory>

namespace wisp {
namespace {

constexpr int kBacklog = 4;
constexpr int kConnectTimeoutMs = 5000;
constexpr std::uint64_t kAcceptRetryNs = 100'000'000;  // after the process ran out of descriptors

Result<sockaddr_un> unix_address(const std::string& id, const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail("chardev {}: path {} is longer than the {} bytes that a socket may have", id, path,
                sizeof address.sun_path - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

UniqueFd unix_socket() {
  return UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

const sockaddr* generic(const sockaddr_un& address) {
  return static_cast<const sockaddr*>(static_cast<const void*>(&address));
}

struct AddressListDeleter {
  void operator()(addrinfo* list) const { ::freeaddrinfo(list); }
};
using AddressList = std::unique_ptr<addrinfo, AddressListDeleter>;

std::uint16_t local_port(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(fd, static_cast<sockaddr*>(static_cast<void*>(&address)), &size) != 0) {
    return 0;
  }
  if (address.ss_family == AF_INET) {
    return ntohs(static_cast<const sockaddr_in*>(static_cast<const void*>(&address))->sin_port);
  }
  return ntohs(static_cast<const sockaddr_in6*>(static_cast<const void*>(&address))->sin6_port);
}

// Returns an errno value, 0 for success.
int connect_within(int fd, const sockaddr* address, socklen_t size, int timeout_ms) {
  if (::connect(fd, address, size) == 0) {
    return 0;
  }
  if (errno != EINPROGRESS) {
    return errno;
  }
  pollfd waiting{.fd = fd, .events = POLLOUT, .revents = 0};
  if (::poll(&waiting, 1, timeout_ms) <= 0) {
    return ETIMEDOUT;
  }
  int error = 0;
  socklen_t error_size = sizeof error;
  ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_size);
  return error;
}

}  // namespace

Result<std::unique_ptr<SocketBackend>> SocketBackend::create(const CharConfig& config, EventLoop& loop,
                                                             Log& log) {
  std::unique_ptr<SocketBackend> backend(new SocketBackend(loop, log, config));
  WISP_TRY(backend->start());
  if (config.fd >= 0) {
    WISP_TRY(backend->adopt(config.fd));
  } else if (config.path.empty()) {
    WISP_TRY(backend->open_tcp(config));
  } else if (config.server) {
    WISP_TRY(backend->listen_unix(config.path));
  } else {
    backend->description_ = "unix:" + config.path;
    WISP_ASSIGN(UniqueFd peer, backend->connect_unix(config.path));
    WISP_TRY(backend->attach_peer(std::move(peer)));
  }
  if (backend->listener_.valid()) {
    WISP_TRY(backend->serve(config.wait));
  }
  return backend;
}

SocketBackend::~SocketBackend() {
  shut_down([this] {
    incoming_.stop();
    accept_timer_ = Timer();
  });
  struct stat now{};
  if (!unlink_path_.empty() && ::lstat(unlink_path_.c_str(), &now) == 0 && now.st_dev == bound_.st_dev &&
      now.st_ino == bound_.st_ino) {
    ::unlink(unlink_path_.c_str());
  }
}

Result<void> SocketBackend::adopt(int fd) {
  UniqueFd socket(fd);
  int listening = 0;
  socklen_t size = sizeof listening;
  if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0) {
    return fail_errno(errno, "chardev {}: descriptor {} is no socket", id(), fd);
  }
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    return fail_errno(errno, "chardev {}: cannot set up descriptor {}", id(), fd);
  }
  description_ = fmt::format("fd:{}", fd);
  if (listening != 0) {
    listener_ = std::move(socket);
    return {};
  }
  return attach_peer(std::move(socket));
}

Result<UniqueFd> SocketBackend::connect_unix(const std::string& path) {
  WISP_ASSIGN(const sockaddr_un address, unix_address(id(), path));
  UniqueFd socket = unix_socket();
  if (!socket.valid() || ::connect(socket.get(), generic(address), sizeof address) != 0) {
    return fail_errno(errno, "chardev {}: cannot connect to {}; is there a server?", id(), path);
  }
  return socket;
}

Result<void> SocketBackend::listen_unix(const std::string& path) {
  WISP_ASSIGN(const sockaddr_un address, unix_address(id(), path));
  UniqueFd socket = unix_socket();
  if (!socket.valid()) {
    return fail_errno(errno, "chardev {}: cannot create a socket", id());
  }
  if (::bind(socket.get(), generic(address), sizeof address) != 0) {
    if (errno != EADDRINUSE) {
      return fail_errno(errno, "chardev {}: cannot create socket {}", id(), path);
    }
    struct stat info{};
    if (::lstat(path.c_str(), &info) == 0 && !S_ISSOCK(info.st_mode)) {
      return fail("chardev {}: {} exists and is no socket; remove it or choose another path", id(), path);
    }
    const UniqueFd probe = unix_socket();
    // A full backlog (EAGAIN) is a server as well.
    if (!probe.valid() || ::connect(probe.get(), generic(address), sizeof address) == 0 ||
        (errno != ECONNREFUSED && errno != ENOENT)) {
      return fail("chardev {}: socket {} is in use by another process", id(), path);
    }
    // Left behind by a server that has died.
    ::unlink(path.c_str());
    if (::bind(socket.get(), generic(address), sizeof address) != 0) {
      return fail_errno(errno, "chardev {}: cannot create socket {}", id(), path);
    }
  }
  if (::lstat(path.c_str(), &bound_) == 0) {
    unlink_path_ = path;
  }
  if (::listen(socket.get(), kBacklog) != 0) {
    return fail_errno(errno, "chardev {}: cannot listen on {}", id(), path);
  }
  listener_ = std::move(socket);
  description_ = "unix:" + path;
  return {};
}

Result<void> SocketBackend::open_tcp(const CharConfig& config) {
  if (config.port == 0 && !config.server) {
    return fail("chardev {}: a socket needs path= or port=", id());
  }
  const std::string host = config.host.empty() ? "127.0.0.1" : config.host;
  const std::string port = std::to_string(config.port);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | (config.server ? AI_PASSIVE : 0);
  addrinfo* found = nullptr;
  if (const int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return fail("chardev {}: cannot resolve host {}: {}", id(), host, ::gai_strerror(error));
  }
  const AddressList list(found);
  int error = 0;
  for (const addrinfo* address = list.get(); address != nullptr; address = address->ai_next) {
    UniqueFd socket(::socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket.valid()) {
      error = errno;
      continue;
    }
    if (!config.server) {
      error = connect_within(socket.get(), address->ai_addr, address->ai_addrlen, kConnectTimeoutMs);
      if (error == 0) {
        description_ = fmt::format("tcp:{}:{}", host, config.port);
        return attach_peer(std::move(socket));
      }
      continue;
    }
    const int on = 1;
    ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(socket.get(), address->ai_addr, address->ai_addrlen) != 0 ||
        ::listen(socket.get(), kBacklog) != 0) {
      error = errno;
      continue;
    }
    description_ = fmt::format("tcp:{}:{}", host, local_port(socket.get()));
    listener_ = std::move(socket);
    return {};
  }
  return fail_errno(error, "chardev {}: cannot {} {}:{}", id(), config.server ? "listen on" : "connect to",
                    host, config.port);
}

Result<void> SocketBackend::attach_peer(UniqueFd peer) {
  const int on = 1;
  ::setsockopt(peer.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // in vain on Unix sockets
  WISP_ASSIGN(UniqueFd out, peer.duplicate());
  attach_first(std::move(peer), std::move(out));
  return {};
}

Result<void> SocketBackend::serve(bool wait) {
  WISP_ASSIGN(accept_timer_, timer([this] {
                if (!is_connected()) {
                  incoming_.set_events(EPOLLIN);
                }
              }));
  WISP_ASSIGN(incoming_, watch(listener_.get(), EPOLLIN, [this](std::uint32_t) { accept_peer(); }));
  if (wait) {
    log().warning("chardev {}: waiting for a client on {}", id(), description_);
    // By the loop, which also hears of signals: they end the wait, and the loop.
    while (!is_connected() && !loop().stopping()) {
      loop().run_once(-1);
    }
  }
  return {};
}

void SocketBackend::accept_peer() {
  UniqueFd peer(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!peer.valid()) {
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      // The client stays in the queue: look again later instead of spinning.
      incoming_.set_events(0);
      accept_timer_.arm(kAcceptRetryNs);
    }
    return;  // else it has gone again
  }
  const int on = 1;
  ::setsockopt(peer.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  auto out = peer.duplicate();
  if (!out.has_value()) {
    log().warning("chardev {}: {}", id(), out.error().message);
    return;
  }
  incoming_.set_events(0);
  attach(std::move(peer), *std::move(out));
}

void SocketBackend::peer_gone() {
  incoming_.set_events(EPOLLIN);
}

}  // namespace wisp
