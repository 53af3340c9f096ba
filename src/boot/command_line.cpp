#include "boot/command_line.h"

#include "boot/layout.h"

namespace wisp {
namespace {

bool is_blank(char c) {
  return c == ' ' || c == '\t' || c == '\n';
}

// Where the arguments for init begin: at a "--" that is a word of its own and not inside double quotes.
std::size_t init_arguments(std::string_view text) {
  bool quoted = false;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '"') {
      quoted = !quoted;
    }
    const bool word_start = at == 0 || is_blank(text[at - 1]);
    if (!quoted && word_start && text.substr(at, 2) == "--" &&
        (at + 2 == text.size() || is_blank(text[at + 2]))) {
      return at;
    }
  }
  return text.size();
}

}  // namespace

Result<KernelCommandLine> build_command_line(std::string_view base, std::span<const VirtioMmioSlot> devices,
                                             std::uint32_t max) {
  if (base.size() > max) {
    return fail("the command line has {} bytes, this kernel takes at most {}: shorten it (-append)",
                base.size(), max);
  }
  if (base.find('\0') != std::string_view::npos) {
    return fail("the command line has a zero byte in it");
  }
  const std::size_t split = init_arguments(base);
  std::string_view kernel_part = base.substr(0, split);
  const std::string_view init_part = base.substr(split);
  while (!init_part.empty() && !kernel_part.empty() && is_blank(kernel_part.back())) {
    kernel_part.remove_suffix(1);
  }
  std::string text(kernel_part);
  std::uint32_t named = 0;
  for (const VirtioMmioSlot& device : devices) {
    const std::string word = fmt::format("{}virtio_mmio.device={}@{:#x}:{}", text.empty() ? "" : " ",
                                         layout::kVirtioMmioSize, device.base, device.gsi);
    const std::size_t rest = init_part.empty() ? 0 : init_part.size() + 1;
    if (text.size() + word.size() + rest > max) {
      break;
    }
    text += word;
    ++named;
  }
  if (named == 0) {
    return KernelCommandLine{std::string(base), 0};
  }
  if (!init_part.empty()) {
    text += ' ';
    text += init_part;
  }
  return KernelCommandLine{std::move(text), named};
}

}  // namespace wisp
