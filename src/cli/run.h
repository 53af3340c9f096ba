// Running one machine from a checked command line.
#pragma once

#include <cstdint>

#include "control/command_line.h"

namespace wisp {

// Exit statuses of the program.
inline constexpr int kExitGood = 0;
inline constexpr int kExitFailed = 1;    // while the machine ran
inline constexpr int kExitBadInput = 2;  // it could not start

// Runs the machine to its end and returns the exit status; errors go to standard error. With -daemonize it
// returns in the background process. `process_start_ns` is the monotonic time at the start of main().
[[nodiscard]] int run_machine(const CommandLine& command_line, const DriverTables& tables,
                              std::uint64_t process_start_ns);

}  // namespace wisp
