#include "cli/run.h"

#include <fcntl.h>

#include <cerrno>
#include <csignal>
#include <optional>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "cli/process.h"
#include "control/qmp_server.h"
#include "machine/engine.h"
#include "machine/machine.h"
#include "sandbox/seccomp.h"

namespace wisp {
namespace {

Result<UniqueFd> open_log(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0640));
  if (!fd.valid()) {
    return fail_errno(errno, "-D: cannot write '{}'", path);
  }
  return fd;
}

// Lets signals end the machine, whichever state it is in; without one they end the waiting loop. SIGWINCH
// tells it of the terminal's new size instead.
class SignalTarget final {
 public:
  explicit SignalTarget(EventLoop& loop) : loop_(loop) {}
  void set_machine(Machine* machine) { machine_ = machine; }
  void handle(int signal) {
    if (signal == SIGWINCH) {
      if (machine_ != nullptr) {
        machine_->refresh_terminal_sizes();
      }
    } else if (machine_ != nullptr) {
      machine_->quit(ShutdownReason::kHostSignal);
    } else {
      loop_.stop();
    }
  }

 private:
  EventLoop& loop_;
  Machine* machine_ = nullptr;
};

// Everything up to the end of the machine. Locals are destroyed in reverse: the machine before what it uses,
// sockets and pidfile last, so that they vanish on every way out.
Result<int> run(const CommandLine& command_line, const DriverTables& tables, std::uint64_t process_start_ns,
                Log& log, bool& started) {
  const ProcessConfig& process = command_line.launch.process;
  std::optional<Daemon> daemon;
  WISP_TRY(forbid_new_privileges());
  if (process.daemonize) {
    WISP_ASSIGN(daemon, Daemon::start());
  }
  const SystemClock clock;
  SystemEntropy entropy;
  WISP_ASSIGN(const auto loop, EventLoop::create());
  SignalTarget target(*loop);
  WISP_TRY(restore_terminal_on_deadly_signals());
  WISP_ASSIGN(const auto signals, Signals::create(*loop, [&target](int signal) { target.handle(signal); }));
  std::unique_ptr<PidFile> pidfile;
  if (!process.pidfile.empty()) {
    WISP_ASSIGN(pidfile, PidFile::create(process.pidfile));
  }
  WISP_ASSIGN(const auto qmp, QmpServer::create({*loop, clock, log}, process.qmp, tables, process.uuid));

  WISP_ASSIGN(EngineChoice choice,
              choose_engine(command_line.launch.machine,
                            EngineServices{.clock = clock, .log = log, .seccomp = process.seccomp}));
  WISP_ASSIGN(const auto machine,
              Machine::create(command_line.launch.machine, std::move(choice.engine),
                              MachineServices{.loop = *loop,
                                              .log = log,
                                              .clock = clock,
                                              .entropy = entropy,
                                              .process_start_ns = process_start_ns,
                                              .seccomp = process.seccomp,
                                              .judge_engine = std::move(choice.judge_engine),
                                              .other_engine = std::move(choice.other_engine)}));
  target.set_machine(machine.get());
  // Whatever happens from here on, QMP lets go of the machine before it is destroyed.
  struct Detach {
    QmpServer& server;
    ~Detach() { server.detach(); }
  } const detach{*qmp};
  WISP_TRY(qmp->attach(*machine));
  while (!qmp->waited_clients_came() && !loop->stopping()) {
    loop->run_once(-1);
  }
  if (loop->stopping()) {
    return machine->exit_status();
  }
  WISP_TRY(machine->start());
  if (daemon) {
    WISP_TRY(daemon->ready());
  }
  started = true;
  give_free_memory_back();
  if (process.seccomp) {
    WISP_TRY(install_seccomp(ThreadKind::kMain));
  }
  loop->run();
  return machine->exit_status();
}

}  // namespace

int run_machine(const CommandLine& command_line, const DriverTables& tables, std::uint64_t process_start_ns) {
  const ProcessConfig& process = command_line.launch.process;
  Log log(STDERR_FILENO, process.verbose ? LogLevel::kInfo : LogLevel::kWarning);
  for (const std::string& warning : command_line.warnings) {
    log.warning("{}", warning);
  }
  UniqueFd log_file;
  if (!process.log_file.empty()) {
    auto opened = open_log(process.log_file);
    if (!opened) {
      log.error("{}", opened.error().message);
      return kExitBadInput;
    }
    log_file = *std::move(opened);
    log.set_fd(log_file.get());
  }
  keep_memory_small();
  allow_many_files();
  bool started = false;
  const auto status = run(command_line, tables, process_start_ns, log, started);
  if (!status) {
    // Whoever typed the command sees why it failed, also where the log goes to a file.
    if (log_file.valid() && !started) {
      Log(STDERR_FILENO).error("{}", status.error().message);
    }
    log.error("{}", status.error().message);
    return started ? kExitFailed : kExitBadInput;
  }
  return *status;
}

}  // namespace wisp
