// What a command line asks for: a machine, and how the process around it behaves.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/config.h"
#include "machine/device_table.h"

namespace wisp {

// The tables that options and QMP arguments are checked against, so that parsing does not depend on who
// fills them.
struct DriverTables {
  std::span<const DriverInfo> devices;
  std::span<const DriverInfo> drives;  // one entry, named ""
  std::span<const DriverInfo> netdevs;
  std::span<const DriverInfo> chardevs;
  std::span<const DriverInfo> objects;
};

// The entry with this name; null where there is none.
[[nodiscard]] inline const DriverInfo* find_driver_in(std::span<const DriverInfo> table,
                                                      std::string_view name) {
  for (const DriverInfo& driver : table) {
    if (driver.name == name) {
      return &driver;
    }
  }
  return nullptr;
}

// Where QMP clients connect: a Unix socket's path, or a numeric TCP address.
struct QmpEndpoint {
  enum class Kind : std::uint8_t { kUnix, kTcp };
  Kind kind = Kind::kUnix;
  std::string path;  // kUnix
  std::string host;  // kTcp: "127.0.0.1", "::1"
  std::uint16_t port = 0;
  // The machine starts only after a client has connected.
  bool wait = false;
};

struct ProcessConfig {
  std::vector<QmpEndpoint> qmp;
  std::string uuid;  // as query-uuid gives it; empty where none was given
  bool daemonize = false;
  std::string pidfile;   // empty: none
  std::string log_file;  // empty: standard error
  // -D was given: messages of lower importance are wanted too.
  bool verbose = false;
  bool seccomp = true;
};

struct LaunchConfig {
  MachineConfig machine;
  ProcessConfig process;
};

}  // namespace wisp
