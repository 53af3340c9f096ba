// QMP, QEMU's machine protocol (https://www.qemu.org/docs/master/interop/qmp-spec.html), over Unix and TCP
// sockets: several sockets, several clients on each. docs/qmp.md lists commands and events.
//
// Runs on one event loop and never blocks it: a slow client is not read from while its answers wait, and is
// cut off when events pile up. There is no limit on commands a second; a client's turn ends after some
// commands, so that others get theirs. A client need not send qmp_capabilities.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "control/launch_config.h"
#include "machine/device_table.h"
#include "machine/machine_control.h"

namespace wisp {

struct QmpServices {
  EventLoop& loop;
  const Clock& clock;  // timestamps of events
  Log& log;
};

// All calls on the loop's thread, or before it runs.
class QmpServer final : public MachineEvents {
 public:
  static constexpr std::size_t kMaxClients = 32;  // of all sockets together

  // Takes the sockets; clients that connect wait until attach(). `uuid` may be empty.
  [[nodiscard]] static Result<std::unique_ptr<QmpServer>> create(const QmpServices& services,
                                                                 std::span<const QmpEndpoint> endpoints,
                                                                 const DriverTables& tables,
                                                                 std::string uuid);
  ~QmpServer() override;
  QmpServer(const QmpServer&) = delete;
  QmpServer& operator=(const QmpServer&) = delete;

  // Serves this machine, which must outlive the server or detach().
  [[nodiscard]] Result<void> attach(MachineControl& machine);
  // Ends all connections, after a last try to send what is left for at most `flush_ms`.
  void detach(int flush_ms = 100);
  // Whether each socket given without nowait has had a client.
  [[nodiscard]] bool waited_clients_came() const;

  // MachineEvents.
  void on_shutdown(bool by_guest, ShutdownReason reason) override;
  void on_reset(bool by_guest) override;
  void on_stop() override;
  void on_resume() override;
  void on_powerdown() override;
  void on_balloon_change(std::uint64_t actual) override;
  void on_device_deleted(const std::string& id, const std::string& path) override;

 private:
  struct Impl;
  explicit QmpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The reference of commands and events in Markdown: docs/qmp.md. `run` gives the answer line to a request
// line, for the examples.
[[nodiscard]] std::string qmp_markdown(const std::function<std::string(const std::string& request)>& run);

}  // namespace wisp
