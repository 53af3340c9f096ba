// A vhost-user back end on a thread of this process: maps the guest memory that it is given and echoes each
// chain, or misbehaves as told.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "virtio/support/device_harness.h"
#include "virtio/vhost_user_fs.h"

namespace wisp::test {

using Bytes = std::vector<std::uint8_t>;
using Request = VhostUserRequest;

inline constexpr std::uint64_t kProtocolFeaturesBit = 1ULL << 30;
inline constexpr std::uint64_t kProtocolMq = 1;
inline constexpr std::uint64_t kProtocolReplyAck = 8;

class TempDir final {
 public:
  TempDir() { WISP_ASSERT(::mkdtemp(path_.data()) != nullptr); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    for (const char* name : {"sock", "file"}) {
      ::unlink((path_ + "/" + name).c_str());
    }
    ::rmdir(path_.c_str());
  }
  [[nodiscard]] std::string file(const char* name) const { return path_ + "/" + name; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_ = "/tmp/wisp-vhost-user-XXXXXX";
};

inline Bytes vhost_user_message(std::uint32_t request, std::uint32_t flags, const Bytes& payload) {
  Bytes message(kVhostUserHeaderSize);
  store_le(message.data(), request);
  store_le(message.data() + 4, flags);
  store_le(message.data() + 8, static_cast<std::uint32_t>(payload.size()));
  message.insert(message.end(), payload.begin(), payload.end());
  return message;
}

template <typename T>
Bytes le_bytes(T value) {
  Bytes bytes(sizeof value);
  store_le(bytes.data(), value);
  return bytes;
}

// What the back end does other than serve.
struct Misdeed {
  enum class Kind : std::uint8_t {
    kDie,      // closes the connection in place of an answer
    kHang,     // does not answer, nor read on
    kSay,      // sends `bytes` in place of the answer
    kDrip,     // sends the answer byte by byte, ten milliseconds apart, and never its last
    kSendFds,  // puts descriptors into the answer
  };
  Request request = Request::kGetFeatures;  // when this comes
  Kind kind = Kind::kDie;
  Bytes bytes{};
  int times_before = 0;  // times that it serves the request first
};

struct BackendSetup {
  std::uint64_t features = kVhostNeededFeaturesForTest | kProtocolFeaturesBit;
  std::uint64_t protocol_features = kProtocolMq | kProtocolReplyAck | (1U << 9) | (1U << 5);
  std::uint64_t queues = 8;
  std::optional<Misdeed> misdeed{};
  std::uint64_t refuse = 0;  // bit N: a negative acknowledgement of request N

  static constexpr std::uint64_t kVhostNeededFeaturesForTest =
      kVirtioFeatureVersion1 | kVirtioFeatureIndirectDesc | kVirtioFeatureEventIdx;
};

struct SeenMessage {
  Request request{};
  std::uint32_t flags = 0;
  Bytes payload;
  std::size_t fds = 0;
};

class FakeVhostUserBackend final {
 public:
  // Listens at once.
  FakeVhostUserBackend(std::string path, BackendSetup setup)
      : setup_(std::move(setup)), path_(std::move(path)), wake_(make_eventfd().value()) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof address.sun_path - 1);
    listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ::unlink(path_.c_str());
    WISP_ASSERT(::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    WISP_ASSERT(::listen(listener_.get(), 1) == 0);
    thread_ = std::thread([this] { run(); });
  }
  ~FakeVhostUserBackend() { end(); }
  FakeVhostUserBackend(const FakeVhostUserBackend&) = delete;
  FakeVhostUserBackend& operator=(const FakeVhostUserBackend&) = delete;

  // As if killed.
  void end() {
    stop_ = true;
    signal_eventfd(wake_.get());
    if (thread_.joinable()) {
      thread_.join();
    }
  }
  [[nodiscard]] std::vector<SeenMessage> seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  void forget_seen() {
    const std::lock_guard lock(mutex_);
    seen_.clear();
  }
  // Messages of this kind, in order.
  [[nodiscard]] std::vector<SeenMessage> seen(Request request) {
    auto all = seen();
    std::erase_if(all, [&](const SeenMessage& message) { return message.request != request; });
    return all;
  }
  // The front end closed the connection.
  [[nodiscard]] bool hung_up() const { return hung_up_; }
  [[nodiscard]] std::uint64_t echoed() const { return echoed_; }
  // Does something on the back end's thread, with its connection.
  void say_unasked(Bytes bytes) {
    {
      const std::lock_guard lock(mutex_);
      unasked_ = std::move(bytes);
    }
    signal_eventfd(wake_.get());
  }

 private:
  struct Vring {
    QueueConfig config{.max_size = kMaxQueueSize};
    std::uint16_t base = 0;
    UniqueFd kick;
    UniqueFd call;
    UniqueFd error;
    bool enabled = false;
    std::optional<Queue> queue;
  };
  struct Region {
    Gpa gpa;
    std::uint64_t size;
    std::uint64_t user;
    void* host;
  };

  void run() {
    pollfd wait{.fd = listener_.get(), .events = POLLIN, .revents = 0};
    while (!stop_) {
      if (::poll(&wait, 1, 5) > 0) {
        peer_ = UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        break;
      }
    }
    while (!stop_ && peer_.valid()) {
      step();
    }
    peer_.reset();
    listener_.reset();
    vrings_.clear();
    for (const Region& region : regions_) {
      ::munmap(region.host, region.size);
    }
  }

  void step() {
    std::vector<pollfd> waits{{.fd = hanging_ ? -1 : peer_.get(), .events = POLLIN, .revents = 0},
                              {.fd = wake_.get(), .events = POLLIN, .revents = 0}};
    std::vector<std::uint32_t> indices;
    for (const auto& [index, vring] : vrings_) {
      if (vring.kick.valid() && vring.enabled && !hanging_) {
        waits.push_back({.fd = vring.kick.get(), .events = POLLIN, .revents = 0});
        indices.push_back(index);
      }
    }
    if (hanging_) {
      // Still notices the front end's end.
      std::uint8_t byte = 0;
      hung_up_ = hung_up_ || ::recv(peer_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
    }
    (void)::poll(waits.data(), waits.size(), hanging_ ? 2 : 1000);
    if (waits[1].revents != 0) {
      drain_eventfd(wake_.get());
      Bytes unasked;
      {
        const std::lock_guard lock(mutex_);
        unasked = std::exchange(unasked_, {});
      }
      put(unasked);
    }
    for (std::size_t i = 0; i < indices.size(); ++i) {
      if (waits[i + 2].revents != 0) {
        serve(vrings_.at(indices[i]));
      }
    }
    if (waits[0].revents != 0 && !receive()) {
      hung_up_ = true;
      peer_.reset();
    }
  }

  void put(const Bytes& bytes) {
    if (!bytes.empty()) {
      (void)!::send(peer_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    }
  }

  bool receive() {
    std::array<std::uint8_t, kVhostUserHeaderSize> header{};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * 8)> control{};
    iovec part{header.data(), header.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    if (::recvmsg(peer_.get(), &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) !=
        static_cast<ssize_t>(header.size())) {
      return false;
    }
    std::vector<UniqueFd> fds;
    for (cmsghdr* item = CMSG_FIRSTHDR(&message); item != nullptr; item = CMSG_NXTHDR(&message, item)) {
      const std::size_t count = (item->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(item) + i * sizeof fd, sizeof fd);
        fds.emplace_back(fd);
      }
    }
    Bytes payload(load_le<std::uint32_t>(header.data() + 8));
    if (!payload.empty() && ::recv(peer_.get(), payload.data(), payload.size(), MSG_WAITALL) !=
                                static_cast<ssize_t>(payload.size())) {
      return false;
    }
    const auto request = static_cast<Request>(load_le<std::uint32_t>(header.data()));
    const auto flags = load_le<std::uint32_t>(header.data() + 4);
    {
      const std::lock_guard lock(mutex_);
      seen_.push_back({.request = request, .flags = flags, .payload = payload, .fds = fds.size()});
    }
    std::optional<Bytes> answer = handle(request, payload, std::move(fds));
    if (!answer && (flags & kVhostUserNeedReply) != 0) {
      const bool refused = ((setup_.refuse >> std::to_underlying(request)) & 1) != 0;
      answer = le_bytes(std::uint64_t{refused ? 1U : 0U});
    }
    const Bytes reply =
        answer ? vhost_user_message(std::to_underlying(request), kVhostUserVersion | kVhostUserReply, *answer)
               : Bytes();
    if (setup_.misdeed && setup_.misdeed->request == request && setup_.misdeed->times_before-- == 0) {
      return misbehave(*setup_.misdeed, reply);
    }
    put(reply);
    return true;
  }

  bool misbehave(const Misdeed& misdeed, const Bytes& reply) {
    switch (misdeed.kind) {
      case Misdeed::Kind::kDie:
        return false;
      case Misdeed::Kind::kHang:
        hanging_ = true;
        return true;
      case Misdeed::Kind::kSay:
        put(misdeed.bytes);
        return true;
      case Misdeed::Kind::kDrip:
        for (std::size_t i = 0; i + 1 < reply.size() && !stop_; ++i) {
          put({reply[i]});
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        hanging_ = true;
        return true;
      case Misdeed::Kind::kSendFds: {
        const std::array<int, 2> fds{wake_.get(), listener_.get()};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof fds)> control{};
        Bytes copy = reply;
        iovec part{copy.data(), copy.size()};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        cmsghdr* rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof fds);
        std::memcpy(CMSG_DATA(rights), fds.data(), sizeof fds);
        return ::sendmsg(peer_.get(), &message, MSG_NOSIGNAL) > 0;
      }
        return true;
    }
    return true;
  }

  std::optional<Bytes> handle(Request request, const Bytes& payload, std::vector<UniqueFd> fds) {
    const auto number = [&](std::size_t at) { return load_le<std::uint32_t>(payload.data() + at); };
    const auto wide = [&](std::size_t at) { return load_le<std::uint64_t>(payload.data() + at); };
    switch (request) {
      case Request::kGetFeatures:
        return le_bytes(setup_.features);
      case Request::kGetProtocolFeatures:
        return le_bytes(setup_.protocol_features);
      case Request::kGetQueueNum:
        return le_bytes(setup_.queues);
      case Request::kSetFeatures:
        features_ = wide(0);
        return std::nullopt;
      case Request::kSetMemTable:
        map(payload, fds);
        return std::nullopt;
      case Request::kSetVringNum:
        vrings_[number(0)].config.size = static_cast<std::uint16_t>(number(4));
        return std::nullopt;
      case Request::kSetVringBase:
        vrings_[number(0)].base = static_cast<std::uint16_t>(number(4));
        return std::nullopt;
      case Request::kSetVringAddr: {
        QueueConfig& config = vrings_[number(0)].config;
        config.ready = true;
        config.descriptor_table = to_gpa(wide(8));
        config.used_ring = to_gpa(wide(16));
        config.available_ring = to_gpa(wide(24));
        return std::nullopt;
      }
      case Request::kSetVringErr:
        vrings_[number(0) & 0xff].error = std::move(fds.at(0));
        return std::nullopt;
      case Request::kSetVringCall:
        vrings_[number(0) & 0xff].call = std::move(fds.at(0));
        return std::nullopt;
      case Request::kSetVringKick: {
        Vring& vring = vrings_[number(0) & 0xff];
        vring.kick = std::move(fds.at(0));
        vring.enabled = (features_ & kProtocolFeaturesBit) == 0;
        vring.queue.emplace(Queue::activate(vring.config, memory_, features_).value());
        vring.queue->set_next_available(vring.base);
        return std::nullopt;
      }
      case Request::kSetVringEnable:
        vrings_[number(0)].enabled = number(4) == 1;
        return std::nullopt;
      case Request::kGetVringBase: {
        Vring& vring = vrings_[number(0)];
        Bytes state = payload;
        store_le(state.data() + 4, std::uint32_t{vring.queue ? vring.queue->next_available() : 0U});
        vring = Vring();
        return state;
      }
      case Request::kSetOwner:
      case Request::kSetProtocolFeatures:
        return std::nullopt;
    }
    return std::nullopt;
  }

  void map(const Bytes& payload, const std::vector<UniqueFd>& fds) {
    vrings_.clear();
    for (const Region& region : regions_) {
      ::munmap(region.host, region.size);
    }
    regions_.clear();
    std::vector<GuestMemoryBlock> blocks;
    WISP_ASSERT(load_le<std::uint32_t>(payload.data()) == fds.size());
    for (std::size_t i = 0; i < fds.size(); ++i) {
      const std::uint8_t* at = payload.data() + 8 + 32 * i;
      const auto size = load_le<std::uint64_t>(at + 8);
      void* host =
          ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i].get(), load_le<off_t>(at + 24));
      WISP_ASSERT(host != MAP_FAILED);
      regions_.push_back({load_le<Gpa>(at), size, load_le<std::uint64_t>(at + 16), host});
      blocks.push_back({.gpa = regions_.back().gpa, .size = size, .host = static_cast<std::uint8_t*>(host)});
    }
    memory_.set_blocks(std::move(blocks));
  }

  Gpa to_gpa(std::uint64_t user) const {
    for (const Region& region : regions_) {
      if (user >= region.user && user - region.user < region.size) {
        return region.gpa + (user - region.user);
      }
    }
    return ~Gpa{0};
  }

  // What is readable in a chain comes back in its writable part, each byte turned over.
  void serve(Vring& vring) {
    drain_eventfd(vring.kick.get());
    DescriptorChain chain;
    for (;;) {
      const PopResult popped = vring.queue->pop(chain);
      if (popped == PopResult::kBroken) {
        signal_eventfd(vring.error.get());
        vring.enabled = false;
        return;
      }
      if (popped == PopResult::kEmpty) {
        if (!vring.queue->enable_notifications()) {
          break;
        }
        continue;
      }
      Bytes bytes(chain.readable_size());
      chain.read(0, bytes);
      for (std::uint8_t& byte : bytes) {
        byte ^= 0xff;
      }
      vring.queue->push(chain, static_cast<std::uint32_t>(chain.write(0, bytes)));
      ++echoed_;
    }
    if (vring.queue->take_interrupt_wish()) {
      signal_eventfd(vring.call.get());
    }
  }

  BackendSetup setup_;
  const std::string path_;
  UniqueFd wake_;
  UniqueFd listener_;
  UniqueFd peer_;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> hung_up_ = false;
  std::atomic<std::uint64_t> echoed_ = 0;
  bool hanging_ = false;
  std::uint64_t features_ = 0;
  GuestMemory memory_;
  std::vector<Region> regions_;
  std::map<std::uint32_t, Vring> vrings_;
  std::mutex mutex_;
  std::vector<SeenMessage> seen_;
  Bytes unasked_;
  std::thread thread_;
};

// Two blocks of shared memory, a device and its back end.
class VhostUserKit {
 public:
  // For back ends that hang, and for those that do not, however busy the host is.
  static constexpr VhostUserTimeouts kShort{.connect = std::chrono::milliseconds(50),
                                            .handshake = std::chrono::milliseconds(150),
                                            .exchange = std::chrono::milliseconds(150)};
  static constexpr VhostUserTimeouts kLong{.connect = std::chrono::milliseconds(10'000),
                                           .handshake = std::chrono::milliseconds(10'000),
                                           .exchange = std::chrono::milliseconds(10'000)};

  explicit VhostUserKit(BackendSetup setup = {}) : backend_(dir_.file("sock"), std::move(setup)) {
    options_.path = dir_.file("sock");
  }
  [[nodiscard]] Result<std::unique_ptr<VhostUserFs>> create(EventLoop& loop) {
    return VhostUserFs::create(loop, guest_.memory(), options_, log_, clock_);
  }
  // Where the handshake is expected to go well.
  [[nodiscard]] std::unique_ptr<DeviceHarness> make_harness() {
    return std::make_unique<DeviceHarness>(
        [this](EventLoop& loop, const GuestMemory&) { return create(loop).value(); }, &guest_);
  }

  FakeGuest guest_{{{FakeGuest::kBase, FakeGuest::kDefaultSize}, {1ULL << 32, 1U << 20}},
                   FakeGuest::Backing::kShared};
  TempDir dir_;
  VhostUserFsOptions options_{.id = "fs0", .tag = "share", .num_request_queues = 2, .timeouts = kLong};
  SystemClock clock_;
  UniqueFd log_fd_{::memfd_create("log", MFD_CLOEXEC)};
  Log log_{log_fd_.get()};
  FakeVhostUserBackend backend_;
};

}  // namespace wisp::test
