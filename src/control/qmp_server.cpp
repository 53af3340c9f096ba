#include "control/qmp_server.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <set>
#include <vector>

#include "control/qmp_commands.h"
#include "control/qmp_listener.h"
#include "control/qmp_session.h"

namespace wisp {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr std::uint64_t kAcceptRetry = 100'000'000;

std::string_view reason_name(ShutdownReason reason) {
  switch (reason) {
    case ShutdownReason::kGuestShutdown:
    case ShutdownReason::kDebugExit:
      return "guest-shutdown";
    case ShutdownReason::kGuestReset:
      return "guest-reset";
    case ShutdownReason::kHostQuit:
      return "host-qmp-quit";
    case ShutdownReason::kHostSignal:
      return "host-signal";
    case ShutdownReason::kHostUi:
      return "host-ui";
    case ShutdownReason::kError:
      return "host-error";
  }
  return "none";
}

}  // namespace

struct QmpServer::Impl {
  struct Listener {
    QmpListener socket;
    Watch watch = {};
    bool had_client = false;
  };

  Impl(const QmpServices& with, const DriverTables& all_tables, std::string machine_uuid)
      : services(with), tables(all_tables), uuid(std::move(machine_uuid)) {}

  Result<void> start();
  void accept_clients(Listener& listener);
  void add_session(UniqueFd fd);
  void on_session(std::uint64_t id, std::uint32_t events);
  void continue_session(std::uint64_t id);
  void after_work(std::uint64_t id);
  void reap();
  void broadcast(std::string_view event, Json data);
  QmpReply run(QmpFds& fds, const Json& request, std::function<void()>& after_reply);
  void drop_drive_of(const std::string& device);

  const QmpServices services;
  const DriverTables tables;
  const std::string uuid;
  MachineControl* machine = nullptr;
  std::vector<std::unique_ptr<Listener>> listeners;
  std::map<std::uint64_t, std::unique_ptr<QmpSession>> sessions;
  std::uint64_t next_id = 1;
  std::set<std::string> drives_of_devices;
  // Tasks posted to the loop check it, since they may outlive the server.
  std::shared_ptr<bool> alive = std::make_shared<bool>(true);

  Timer accept_timer;
  Timer balloon_timer;
  bool balloon_quiet = false;  // an event went out less than a second ago
  std::optional<std::uint64_t> balloon_pending;
};

Result<void> QmpServer::Impl::start() {
  WISP_ASSIGN(accept_timer, services.loop.timer([this] {
    for (const auto& listener : listeners) {
      listener->watch.set_events(EPOLLIN);
    }
  }));
  WISP_ASSIGN(balloon_timer, services.loop.timer([this] {
    balloon_quiet = false;
    if (const auto actual = std::exchange(balloon_pending, std::nullopt)) {
      balloon_quiet = true;
      balloon_timer.arm(kSecond);
      broadcast("BALLOON_CHANGE", {{"actual", *actual}});
    }
  }));
  for (const auto& listener : listeners) {
    Listener* const raw = listener.get();
    WISP_ASSIGN(raw->watch, services.loop.watch(raw->socket.fd(), EPOLLIN,
                                                [this, raw](std::uint32_t) { accept_clients(*raw); }));
  }
  return {};
}

void QmpServer::Impl::accept_clients(Listener& listener) {
  UniqueFd fd(::accept4(listener.socket.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd.valid()) {
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      // The client stays in the queue: look again later instead of spinning.
      listener.watch.set_events(0);
      accept_timer.arm(kAcceptRetry);
    }
    return;
  }
  if (sessions.size() >= kMaxClients) {
    const std::string line =
        json_line({{"error",
                    {{"class", "GenericError"},
                     {"desc", fmt::format("{} clients are connected already, the most that are served",
                                          kMaxClients)}}}});
    (void)::send(fd.get(), line.data(), line.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    return;
  }
  listener.had_client = true;
  add_session(std::move(fd));
}

void QmpServer::Impl::add_session(UniqueFd fd) {
  const std::uint64_t id = next_id++;
  auto session = std::make_unique<QmpSession>(
      std::move(fd),
      QmpSession::Host{.run = [this](QmpFds& fds, const Json& request, std::function<void()>& after_reply) {
        return run(fds, request, after_reply);
      }});
  auto watch = services.loop.watch(session->fd(), EPOLLIN,
                                   [this, id](std::uint32_t events) { on_session(id, events); });
  if (!watch) {
    services.log.warning("QMP: {}", watch.error().message);
    return;
  }
  session->set_watch(*std::move(watch));
  session->send(json_line({{"QMP", {{"version", version_json()}, {"capabilities", Json::array()}}}}));
  sessions.emplace(id, std::move(session));
  reap();  // it may be gone already
}

void QmpServer::Impl::on_session(std::uint64_t id, std::uint32_t events) {
  const auto found = sessions.find(id);
  if (found != sessions.end()) {
    found->second->on_events(events);
    after_work(id);
  }
}

void QmpServer::Impl::continue_session(std::uint64_t id) {
  const auto found = sessions.find(id);
  if (found != sessions.end()) {
    found->second->work();
    after_work(id);
  }
}

void QmpServer::Impl::after_work(std::uint64_t id) {
  // detach() may have come as a command's consequence.
  const auto found = sessions.find(id);
  if (found != sessions.end() && found->second->has_more_work()) {
    services.loop.post([this, id, still = std::weak_ptr<bool>(alive)] {
      if (!still.expired()) {
        continue_session(id);
      }
    });
  }
  reap();
}

void QmpServer::Impl::reap() {
  std::erase_if(sessions, [this](const auto& entry) {
    if (entry.second->closed() && !entry.second->reason().empty()) {
      services.log.warning("QMP: a client was cut off: {}", entry.second->reason());
    }
    return entry.second->closed();
  });
}

void QmpServer::Impl::broadcast(std::string_view event, Json data) {
  const std::uint64_t now = services.clock.realtime_ns();
  Json message{
      {"event", event},
      {"timestamp", {{"seconds", now / kSecond}, {"microseconds", now % kSecond / 1000}}},
  };
  if (!data.is_null()) {
    message["data"] = std::move(data);
  }
  const std::string line = json_line(message);
  // Sessions are only marked here; whoever runs next on the loop reaps them, since one may be at work.
  bool any_closed = false;
  for (const auto& [id, session] : sessions) {
    if (session->negotiated()) {
      session->send(line);
      any_closed = any_closed || session->closed();
    }
  }
  if (any_closed) {
    services.loop.post([this, still = std::weak_ptr<bool>(alive)] {
      if (!still.expired()) {
        reap();
      }
    });
  }
}

QmpReply QmpServer::Impl::run(QmpFds& fds, const Json& request, std::function<void()>& after_reply) {
  WISP_ASSERT(machine != nullptr);
  QmpContext context{.machine = *machine,
                     .tables = tables,
                     .uuid = uuid,
                     .fds = fds,
                     .drives_of_devices = drives_of_devices,
                     .log = services.log};
  QmpReply reply = run_qmp_command(context, request);
  after_reply = std::move(context.after_reply);
  return reply;
}

// Later, since the machine is in the middle of letting the device go.
void QmpServer::Impl::drop_drive_of(const std::string& device) {
  if (drives_of_devices.erase(device) == 0) {
    return;
  }
  services.loop.post([this, device, still = std::weak_ptr<bool>(alive)] {
    if (!still.expired() && machine != nullptr) {
      if (auto removed = machine->remove_drive(device); !removed) {
        services.log.warning("QMP: drive {} stays: {}", device, removed.error().message);
      }
    }
  });
}

Result<std::unique_ptr<QmpServer>> QmpServer::create(const QmpServices& services,
                                                     std::span<const QmpEndpoint> endpoints,
                                                     const DriverTables& tables, std::string uuid) {
  auto impl = std::make_unique<Impl>(services, tables, std::move(uuid));
  for (const QmpEndpoint& endpoint : endpoints) {
    WISP_ASSIGN(QmpListener socket, QmpListener::open(endpoint));
    impl->listeners.push_back(std::make_unique<Impl::Listener>(std::move(socket)));
  }
  return std::unique_ptr<QmpServer>(new QmpServer(std::move(impl)));
}

QmpServer::QmpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

QmpServer::~QmpServer() {
  detach(0);
}

Result<void> QmpServer::attach(MachineControl& machine) {
  WISP_ASSERT(impl_->machine == nullptr);
  impl_->machine = &machine;
  machine.add_events(this);
  return impl_->start();
}

void QmpServer::detach(int flush_ms) {
  if (impl_->machine == nullptr) {
    return;
  }
  impl_->machine->remove_events(this);
  impl_->machine = nullptr;
  impl_->listeners.clear();
  const std::uint64_t end =
      impl_->services.clock.monotonic_ns() + static_cast<std::uint64_t>(flush_ms) * 1'000'000;
  while (true) {
    std::vector<pollfd> waiting;
    for (const auto& [id, session] : impl_->sessions) {
      session->finish_input();
      session->flush();
      if (!session->closed() && session->unsent() > 0) {
        waiting.push_back({.fd = session->fd(), .events = POLLOUT, .revents = 0});
      }
    }
    const std::uint64_t now = impl_->services.clock.monotonic_ns();
    if (waiting.empty() || now >= end ||
        ::poll(waiting.data(), waiting.size(), static_cast<int>((end - now) / 1'000'000)) <= 0) {
      break;
    }
  }
  impl_->sessions.clear();
}

bool QmpServer::waited_clients_came() const {
  return std::ranges::all_of(impl_->listeners, [](const auto& listener) {
    return !listener->socket.wait() || listener->had_client;
  });
}

void QmpServer::on_shutdown(bool by_guest, ShutdownReason reason) {
  impl_->broadcast("SHUTDOWN", {{"guest", by_guest}, {"reason", reason_name(reason)}});
}

void QmpServer::on_reset(bool by_guest) {
  impl_->broadcast("RESET",
                   {{"guest", by_guest}, {"reason", by_guest ? "guest-reset" : "host-qmp-system-reset"}});
}

void QmpServer::on_stop() {
  impl_->broadcast("STOP", {});
}

void QmpServer::on_resume() {
  impl_->broadcast("RESUME", {});
}

void QmpServer::on_powerdown() {
  impl_->broadcast("POWERDOWN", {});
}

void QmpServer::on_balloon_change(std::uint64_t actual) {
  // The guest decides how often this comes.
  if (impl_->balloon_quiet) {
    impl_->balloon_pending = actual;
    return;
  }
  impl_->balloon_quiet = true;
  impl_->balloon_timer.arm(kSecond);
  impl_->broadcast("BALLOON_CHANGE", {{"actual", actual}});
}

void QmpServer::on_device_deleted(const std::string& id, const std::string& path) {
  impl_->broadcast("DEVICE_DELETED", {{"device", id}, {"path", path}});
  impl_->drop_drive_of(id);
}

}  // namespace wisp
