#include "virtio/vsock_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <optional>
#include <string_view>
#include <utility>

#include "virtio/vsock_connection.h"

namespace wisp {
namespace {

constexpr std::size_t kMaxText = 32;  // "CONNECT 4294967295\n" and some
constexpr int kBacklog = 128;
constexpr int kAcceptsPerCall = 16;

// The port of "CONNECT <port>", without the end of the line.
std::optional<std::uint32_t> parse_connect(std::string_view line) {
  constexpr std::string_view kVerb = "CONNECT ";
  if (line.ends_with('\r')) {
    line.remove_suffix(1);
  }
  if (!line.starts_with(kVerb)) {
    return std::nullopt;
  }
  line.remove_prefix(kVerb.size());
  std::uint32_t port = 0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), port);
  return error == std::errc{} && end == line.data() + line.size() ? std::optional(port) : std::nullopt;
}

}  // namespace

Result<std::unique_ptr<VsockListener>> VsockListener::create(Strand& strand, const Clock& clock,
                                                             const std::string& path,
                                                             VsockListenerOwner& owner) {
  if (path.empty() || path.size() > kMaxPathSize) {
    return fail("path={} has {} bytes, expected 1 to {}", path, path.size(), kMaxPathSize);
  }
  std::unique_ptr<VsockListener> listener(new VsockListener(strand, clock, path, owner));
  WISP_TRY(listener->listen());
  return listener;
}

VsockListener::~VsockListener() {
  struct stat now{};
  // Only what is still our own socket.
  if (inode_ != 0 && ::lstat(path_.c_str(), &now) == 0 && now.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

Result<void> VsockListener::listen() {
  WISP_ASSIGN(socket_, make_unix_socket());
  const sockaddr_un address = unix_address(path_);
  const auto bind = [&] {
    const auto* generic = reinterpret_cast<const sockaddr*>(&address);
    return ::bind(socket_.get(), generic, sizeof address) == 0 ? 0 : errno;
  };
  int error = bind();
  if (error == EADDRINUSE) {
    struct stat there{};
    WISP_ASSIGN(const UniqueFd probe, make_unix_socket());
    if (::lstat(path_.c_str(), &there) != 0 || !S_ISSOCK(there.st_mode) ||
        connect_unix_socket(probe.get(), path_) != ECONNREFUSED) {
      return fail("path={} exists already: another program uses it, or it is no socket", path_);
    }
    ::unlink(path_.c_str());  // left behind by a program that is gone
    error = bind();
  }
  if (error != 0) {
    return fail_errno(error, "cannot create the socket path={}", path_);
  }
  struct stat made{};
  if (::lstat(path_.c_str(), &made) == 0) {
    inode_ = made.st_ino;
  }
  if (::listen(socket_.get(), kBacklog) != 0) {
    return fail_errno(errno, "cannot listen on path={}", path_);
  }
  return {};
}

void VsockListener::update(bool serve, std::size_t room) {
  room_ = room;
  if (serving_ != serve) {
    serving_ = serve;
    for (auto& [id, handshake] : handshakes_) {
      watch_handshake(id, handshake);
    }
  }
  update_watch();
}

void VsockListener::update_watch() {
  const bool wanted = serving_ && !out_of_descriptors_ && handshakes_.size() < room_;
  if (!wanted) {
    watch_.stop();
  } else if (!watch_.active()) {
    auto watch = strand_.watch(socket_.get(), EPOLLIN, [this](std::uint32_t) { accept_some(); });
    if (watch) {
      watch_ = *std::move(watch);
    }
  }
}

void VsockListener::accept_some() {
  for (int i = 0; i < kAcceptsPerCall && handshakes_.size() < room_; ++i) {
    UniqueFd socket(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket.valid()) {
      // With nothing left to accept with, the loop would come back at once.
      out_of_descriptors_ = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
      break;
    }
    const std::uint64_t id = next_id_++;
    Handshake& handshake = handshakes_[id];
    handshake.socket = std::move(socket);
    handshake.deadline_ns = clock_.monotonic_ns() + kTimeoutNs;
    watch_handshake(id, handshake);
  }
  owner_.tick_wanted();
  update_watch();
}

void VsockListener::watch_handshake(std::uint64_t id, Handshake& handshake) {
  if (!serving_) {
    handshake.watch.stop();
  } else if (!handshake.watch.active()) {
    auto watch =
        strand_.watch(handshake.socket.get(), EPOLLIN, [this, id](std::uint32_t) { on_handshake(id); });
    if (watch) {
      handshake.watch = *std::move(watch);
    }
  }
}

// Reads the first line and not a byte more: what follows is for the guest.
void VsockListener::on_handshake(std::uint64_t id) {
  const auto found = handshakes_.find(id);
  if (found == handshakes_.end()) {
    return;
  }
  Handshake& handshake = found->second;
  std::array<char, kMaxText> bytes{};
  const std::size_t room = kMaxText - handshake.text.size();
  const ssize_t peeked = ::recv(handshake.socket.get(), bytes.data(), room, MSG_PEEK | MSG_DONTWAIT);
  if (peeked < 0 && (errno == EAGAIN || errno == EINTR)) {
    return;
  }
  std::string_view seen(bytes.data(), peeked > 0 ? static_cast<std::size_t>(peeked) : 0);
  const std::size_t end = seen.find('\n');
  seen = seen.substr(0, end == std::string_view::npos ? end : end + 1);
  if (!seen.empty()) {
    (void)::recv(handshake.socket.get(), bytes.data(), seen.size(), MSG_DONTWAIT);
    handshake.text += seen;
  }
  if (end == std::string_view::npos && !seen.empty() && handshake.text.size() < kMaxText) {
    return;
  }
  Handshake taken = std::move(handshake);
  taken.watch.stop();
  handshakes_.erase(found);
  const auto port = end == std::string_view::npos
                        ? std::nullopt
                        : parse_connect(std::string_view(taken.text).substr(0, taken.text.size() - 1));
  if (port) {
    owner_.host_connected(std::move(taken.socket), *port);
  }
  update_watch();
}

bool VsockListener::tick() {
  const std::uint64_t now = clock_.monotonic_ns();
  std::erase_if(handshakes_, [now](const auto& entry) { return entry.second.deadline_ns <= now; });
  out_of_descriptors_ = false;
  update_watch();
  return !handshakes_.empty();
}

}  // namespace wisp
