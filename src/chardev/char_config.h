// What a character back end is made from, as plain data.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "chardev/char_backend.h"

namespace wisp {

enum class CharKind : std::uint8_t {
  kNull,    // drops what is written
  kStdio,   // the process's standard input and output
  kPty,     // a new pseudo-terminal; description() says which
  kFile,    // what is written goes to a file
  kSocket,  // Unix (path) or TCP (port): listens (server) or connects
  kRing,    // keeps the last bytes written (RingBackend)
};

struct CharConfig {
  CharKind kind = CharKind::kNull;
  std::string id{};     // for messages
  std::string path{};   // kFile; kSocket over Unix
  bool append = false;  // kFile: keep what the file has
  // kSocket over TCP, where `path` is empty. An empty host is 127.0.0.1.
  std::string host{};
  std::uint16_t port = 0;  // server: 0 lets the host choose; description() says which
  bool server = false;
  bool wait = true;  // server: creating it waits for the first client
  int fd = -1;       // kSocket: a connected or listening socket to be taken over, in place of path and port
  // kStdio: control-A is the escape key (control-A h lists what it can do) and control-C goes to the guest;
  // else control-C ends the process as usual.
  bool escape = false;
  std::function<void()> on_quit{};  // control-A x; on the loop's thread
};

// Opens it. The back end runs on `loop`, which must outlive it. Errors name the id, the path or port, and
// what to do. A program that uses it ignores SIGPIPE.
[[nodiscard]] Result<std::unique_ptr<CharBackend>> create_char_backend(const CharConfig& config,
                                                                       EventLoop& loop, Log& log);

}  // namespace wisp
