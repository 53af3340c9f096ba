#include "chardev/char_config.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "chardev/pty_backend.h"
#include "chardev/ring_backend.h"
#include "chardev/socket_backend.h"
#include "chardev/stdio_backend.h"
#include "chardev/stream_backend.h"

namespace wisp {
namespace {

class NullBackend final : public CharBackend {
 public:
  std::size_t write(std::span<const std::uint8_t> bytes) override { return bytes.size(); }
  void set_receiver(CharReceiver* /*receiver*/) override {}
  void resume_input() override {}
  [[nodiscard]] std::string description() const override { return "null"; }
  [[nodiscard]] bool is_connected() const override { return false; }
};

class FileBackend final : public StreamBackend {
 public:
  static Result<std::unique_ptr<FileBackend>> create(const CharConfig& config, EventLoop& loop, Log& log) {
    std::unique_ptr<FileBackend> backend(new FileBackend(loop, log, config));
    WISP_TRY(backend->start());
    UniqueFd fd(::open(
        config.path.c_str(),
        O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (config.append ? O_APPEND : O_TRUNC), 0666));
    if (!fd.valid()) {
      return fail_errno(errno, "chardev {}: cannot open file {} for writing", config.id, config.path);
    }
    backend->attach_first(UniqueFd(), std::move(fd));
    return backend;
  }
  ~FileBackend() override { shut_down(); }
  [[nodiscard]] std::string description() const override { return "file:" + path_; }

 private:
  FileBackend(EventLoop& loop, Log& log, const CharConfig& config)
      : StreamBackend(loop, log, config.id), path_(config.path) {}
  void peer_gone() override {}
  [[nodiscard]] bool end_of_input_is_end_of_peer() const override { return false; }

  const std::string path_;
};

}  // namespace

Result<std::unique_ptr<CharBackend>> create_char_backend(const CharConfig& config, EventLoop& loop,
                                                         Log& log) {
  switch (config.kind) {
    case CharKind::kNull:
      return std::make_unique<NullBackend>();
    case CharKind::kStdio:
      return StdioBackend::create(config, STDIN_FILENO, STDOUT_FILENO, loop, log);
    case CharKind::kPty:
      return PtyBackend::create(config, loop, log);
    case CharKind::kFile:
      return FileBackend::create(config, loop, log);
    case CharKind::kSocket:
      return SocketBackend::create(config, loop, log);
    case CharKind::kRing:
      return std::make_unique<RingBackend>();
  }
  return fail("chardev {}: unknown kind", config.id);
}

}  // namespace wisp
