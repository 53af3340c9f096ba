#include "net/passt.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <optional>
#include <utility>

#include "base/checked.h"
#include "base/property.h"

namespace wisp {
namespace {

// How long passt may take to get ready before it is left to itself.
constexpr std::chrono::milliseconds kReadyTime{500};
// How long its end may take to follow the end of its socket.
constexpr int kEndMs = 100;

std::optional<std::uint16_t> parse_port(std::string_view text) {
  const auto number = parse_uint(text);
  if (!number || *number == 0) {
    return std::nullopt;
  }
  return checked_cast<std::uint16_t>(*number);
}

Result<PortForward> parse_port_forward(std::string_view text) {
  const auto bad = [&] { return fail("hostfwd={} is not of the form tcp::2222-:22", text); };
  PortForward forward;
  std::string_view rest = text;
  const std::size_t colon = rest.find(':');
  if (colon == std::string_view::npos) {
    return bad();
  }
  const std::string_view protocol = rest.substr(0, colon);
  if (!protocol.empty() && protocol != "tcp" && protocol != "udp") {
    return bad();
  }
  forward.udp = protocol == "udp";
  rest.remove_prefix(colon + 1);
  const std::size_t dash = rest.rfind('-');
  if (dash == std::string_view::npos) {
    return bad();
  }
  std::string_view host = rest.substr(0, dash);
  const std::string_view guest = rest.substr(dash + 1);

  const std::size_t host_colon = host.rfind(':');
  const std::size_t guest_colon = guest.rfind(':');
  if (host_colon == std::string_view::npos || guest_colon == std::string_view::npos) {
    return bad();
  }
  if (guest_colon != 0) {
    return fail("hostfwd={} names a guest address; passt gives the guest one address, leave it out", text);
  }
  const auto host_port = parse_port(host.substr(host_colon + 1));
  const auto guest_port = parse_port(guest.substr(1));
  if (!host_port || !guest_port) {
    return fail("hostfwd={} has a port that is not 1 to 65535", text);
  }
  forward.host_port = *host_port;
  forward.guest_port = *guest_port;
  std::string_view address = host.substr(0, host_colon);
  if (address.starts_with('[') && address.ends_with(']')) {
    address = address.substr(1, address.size() - 2);
  }
  if (address.find_first_not_of("0123456789abcdefABCDEF.:") != std::string_view::npos) {
    return fail("hostfwd={} has a host address that is not numeric", text);
  }
  forward.host_address = address;
  return forward;
}

// How many seccomp filters a process runs under; empty where the kernel does not tell.
std::optional<std::uint64_t> seccomp_filters(const std::string& status_path) {
  const UniqueFd fd(::open(status_path.c_str(), O_RDONLY | O_CLOEXEC));
  std::array<char, 4096> buffer;
  const ssize_t size = fd.valid() ? ::read(fd.get(), buffer.data(), buffer.size()) : -1;
  if (size <= 0) {
    return std::nullopt;
  }
  constexpr std::string_view kKey = "\nSeccomp_filters:\t";
  std::string_view text(buffer.data(), static_cast<std::size_t>(size));
  const std::size_t at = text.find(kKey);
  if (at == std::string_view::npos) {
    return std::nullopt;
  }
  text.remove_prefix(at + kKey.size());
  return parse_uint(text.substr(0, text.find('\n')));
}

}  // namespace

Result<std::vector<PortForward>> parse_port_forwards(std::string_view text) {
  std::vector<PortForward> forwards;
  while (!text.empty()) {
    const std::size_t end = text.find(';');
    WISP_ASSIGN(PortForward forward, parse_port_forward(text.substr(0, end)));
    forwards.push_back(std::move(forward));
    text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
  }
  return forwards;
}

Result<std::unique_ptr<PasstBackend>> PasstBackend::start(const PasstOptions& options) {
  std::array<int, 2> sockets{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()) != 0) {
    return fail_errno(errno, "cannot create a socket pair for passt");
  }
  UniqueFd ours(sockets[0]);
  UniqueFd theirs(sockets[1]);
  // passt drops what does not fit, and TCP then waits for it to be sent again: the usual 208 KiB are less
  // than one window of the guest's. The kernel cuts this down to net.core.wmem_max.
  constexpr int kRoom = 4 << 20;
  for (const UniqueFd* const end : {&ours, &theirs}) {
    (void)::setsockopt(end->get(), SOL_SOCKET, SO_SNDBUF, &kRoom, sizeof kRoom);
  }
  std::array<int, 2> pipes{};
  // Non-blocking at passt's end too: a full pipe must not stop it.
  if (::pipe2(pipes.data(), O_CLOEXEC | O_NONBLOCK) != 0) {
    return fail_errno(errno, "cannot create a pipe for passt");
  }
  UniqueFd errors(pipes[0]);
  UniqueFd their_errors(pipes[1]);

  std::vector<std::string> arguments{"--foreground", "--quiet", "--fd", "3"};
  for (const PortForward& forward : options.forwards) {
    arguments.emplace_back(forward.udp ? "--udp-ports" : "--tcp-ports");
    const std::string ports = fmt::format("{}:{}", forward.host_port, forward.guest_port);
    arguments.push_back(forward.host_address.empty() ? ports : forward.host_address + "/" + ports);
  }
  if (options.mtu != 0) {
    arguments.emplace_back("--mtu");
    arguments.push_back(std::to_string(options.mtu));
  }
  if (!options.ipv6) {
    arguments.emplace_back("--ipv4-only");
  } else if (!options.ipv4) {
    arguments.emplace_back("--ipv6-only");
  }
  auto child = ChildProcess::spawn(options.program, arguments, theirs.get(), their_errors.get());
  if (!child) {
    return fail("{} (install Debian's package passt, or name the program with path=)", child.error().message);
  }
  theirs.reset();
  their_errors.reset();
  WISP_ASSIGN(auto stream, StreamNetBackend::create(std::move(ours), "passt"));
  std::unique_ptr<PasstBackend> backend(
      new PasstBackend(*std::move(child), std::move(stream), std::move(errors)));
  WISP_TRY(backend->wait_until_ready());
  return backend;
}

// passt tells nobody when it is ready, but installs a system-call filter as the last step before it serves.
// Until then it may still end with a complaint about its options.
Result<void> PasstBackend::wait_until_ready() {
  const auto own = seccomp_filters("/proc/thread-self/status");
  const std::string path = fmt::format("/proc/{}/status", child_->pid());
  pollfd ended{.fd = stream_->poll_fd(0), .events = POLLIN | POLLRDHUP, .revents = 0};
  const auto deadline = std::chrono::steady_clock::now() + kReadyTime;
  while (std::chrono::steady_clock::now() < deadline) {
    const int ready = ::poll(&ended, 1, 1);
    if (ready > 0 && (ended.revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0) {
      return fail("{}", failure());
    }
    const auto its = seccomp_filters(path);
    if (ready > 0 || !own || (its && *its > *own)) {
      break;
    }
  }
  return {};
}

std::string PasstBackend::complaints() {
  std::array<char, 4096> buffer;
  const ssize_t size = ::read(errors_.get(), buffer.data(), buffer.size());
  std::string_view text(buffer.data(), size > 0 ? static_cast<std::size_t>(size) : 0);
  std::string result;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    // What every run says, for a process without a system log or started by root.
    if (!line.empty() && !line.starts_with("Failed to send") && !line.starts_with("Don't run as root")) {
      result += result.empty() ? "" : ", ";
      result += line;
    }
    text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
  }
  for (char& c : result) {
    c = static_cast<unsigned char>(c) < ' ' ? '?' : c;
  }
  return result.substr(0, 400);
}

NetIo PasstBackend::send(std::uint16_t pair, std::span<const iovec> frame) {
  return stream_->send(pair, frame);
}

NetReceived PasstBackend::receive(std::uint16_t pair, std::span<const iovec> buffers) {
  return stream_->receive(pair, buffers);
}

std::string PasstBackend::description() const {
  return fmt::format("passt (pid {})", child_->pid());
}

std::string PasstBackend::failure() {
  std::optional<std::string> end = child_->ended();
  for (int waited = 0; !end && waited < kEndMs; ++waited) {
    ::poll(nullptr, 0, 1);
    end = child_->ended();
  }
  const std::string said = complaints();
  return fmt::format("passt {}{}{}", end ? "ended with " + *end : stream_->failure(),
                     said.empty() ? "" : ": ", said);
}

}  // namespace wisp
