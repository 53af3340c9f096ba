// What a command line asks for: a machine, and how the process around it behaves.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine/config.h"

namespace wisp {

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
