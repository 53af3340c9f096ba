#include "control/qmp_listener.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace wisp {
namespace {

constexpr int kBacklog = 16;
constexpr int kSocketFlags = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;

// Every sockaddr_* may be passed where sockaddr is asked for.
const sockaddr* generic(const auto* address) {
  return reinterpret_cast<const sockaddr*>(address);
}

// Removes the socket file of a process that is gone.
Result<void> clear_path(const std::string& path, const sockaddr_un& address) {
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? Result<void>() : fail_errno(errno, "-qmp: cannot look at '{}'", path);
  }
  if (!S_ISSOCK(status.st_mode)) {
    return fail("-qmp: '{}' exists and is not a socket; name another path", path);
  }
  const UniqueFd probe(::socket(AF_UNIX, kSocketFlags, 0));
  if (!probe.valid()) {
    return fail_errno(errno, "-qmp: cannot create a socket");
  }
  if (::connect(probe.get(), generic(&address), sizeof address) == 0 || errno == EAGAIN) {
    return fail("-qmp: socket '{}' is in use by another process; name another path or end that process",
                path);
  }
  if (errno != ECONNREFUSED) {
    return fail_errno(errno, "-qmp: cannot tell whether socket '{}' is in use", path);
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    return fail_errno(errno, "-qmp: cannot replace the dead socket '{}'", path);
  }
  return {};
}

Result<UniqueFd> listen_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail("-qmp: path '{}' has {} bytes, but a Unix socket's path has at most {}; use a shorter one",
                path, path.size(), sizeof address.sun_path - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  WISP_TRY(clear_path(path, address));
  UniqueFd fd(::socket(AF_UNIX, kSocketFlags, 0));
  if (!fd.valid()) {
    return fail_errno(errno, "-qmp: cannot create a socket");
  }
  // The file gets the socket's own mode, so that it is never open to others, not even between two calls.
  if (::fchmod(fd.get(), 0600) != 0 || ::bind(fd.get(), generic(&address), sizeof address) != 0) {
    return fail_errno(errno, "-qmp: cannot create socket '{}'", path);
  }
  return fd;
}

Result<UniqueFd> listen_tcp(const std::string& host, std::uint16_t port) {
  sockaddr_in v4{};
  v4.sin_family = AF_INET;
  v4.sin_port = htons(port);
  sockaddr_in6 v6{};
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(port);
  const bool is_v4 = ::inet_pton(AF_INET, host.c_str(), &v4.sin_addr) == 1;
  if (!is_v4 && ::inet_pton(AF_INET6, host.c_str(), &v6.sin6_addr) != 1) {
    return fail("-qmp: '{}' is not a numeric address", host);
  }
  UniqueFd fd(::socket(is_v4 ? AF_INET : AF_INET6, kSocketFlags, 0));
  const int on = 1;
  if (!fd.valid() || ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0) {
    return fail_errno(errno, "-qmp: cannot create a TCP socket");
  }
  const int bound =
      is_v4 ? ::bind(fd.get(), generic(&v4), sizeof v4) : ::bind(fd.get(), generic(&v6), sizeof v6);
  if (bound != 0) {
    return fail_errno(errno, "-qmp: cannot listen on {} port {}", host, port);
  }
  return fd;
}

}  // namespace

Result<QmpListener> QmpListener::open(const QmpEndpoint& endpoint) {
  QmpListener listener;
  listener.wait_ = endpoint.wait;
  if (endpoint.kind == QmpEndpoint::Kind::kUnix) {
    listener.name_ = "unix:" + endpoint.path;
    WISP_ASSIGN(listener.fd_, listen_unix(endpoint.path));
    struct stat status{};
    if (::lstat(endpoint.path.c_str(), &status) == 0) {
      listener.path_ = endpoint.path;
      listener.device_ = status.st_dev;
      listener.inode_ = status.st_ino;
    }
  } else {
    listener.name_ = fmt::format("tcp:{}:{}", endpoint.host, endpoint.port);
    WISP_ASSIGN(listener.fd_, listen_tcp(endpoint.host, endpoint.port));
  }
  if (::listen(listener.fd_.get(), kBacklog) != 0) {
    return fail_errno(errno, "-qmp: cannot listen on {}", listener.name_);
  }
  return listener;
}

QmpListener::QmpListener(QmpListener&& other) noexcept
    : fd_(std::move(other.fd_)),
      name_(std::move(other.name_)),
      path_(std::exchange(other.path_, {})),
      device_(other.device_),
      inode_(other.inode_),
      wait_(other.wait_) {}

QmpListener::~QmpListener() {
  struct stat status{};
  if (!path_.empty() && ::lstat(path_.c_str(), &status) == 0 && status.st_dev == device_ &&
      status.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

}  // namespace wisp
