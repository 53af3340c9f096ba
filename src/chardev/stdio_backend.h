// The process's standard input and output.
#pragma once

#include "chardev/char_config.h"
#include "chardev/stream_backend.h"
#include "chardev/terminal.h"

namespace wisp {

// Where standard input is a terminal it is in raw mode as long as this lives. End of file ends the input
// only.
class StdioBackend final : public StreamBackend {
 public:
  // `input` and `output` are 0 and 1 but for tests; borrowed.
  [[nodiscard]] static Result<std::unique_ptr<StdioBackend>> create(const CharConfig& config, int input,
                                                                    int output, EventLoop& loop, Log& log);
  ~StdioBackend() override;

  [[nodiscard]] std::string description() const override { return "stdio"; }
  [[nodiscard]] std::pair<std::uint16_t, std::uint16_t> size() const override {
    return terminal_size(output_);
  }

 private:
  // O_NONBLOCK set on a descriptor that others may share, to be taken back.
  struct SharedFlags {
    int fd = -1;
    int flags = 0;
  };

  StdioBackend(EventLoop& loop, Log& log, const CharConfig& config, int output);
  [[nodiscard]] Result<UniqueFd> open_private(int fd, int access);
  void set_up_escape(const CharConfig& config);
  void peer_gone() override {}
  [[nodiscard]] bool end_of_input_is_end_of_peer() const override { return false; }

  const int output_;
  std::vector<SharedFlags> shared_flags_;
  std::unique_ptr<RawTerminal> terminal_;
};

}  // namespace wisp
