#include "chardev/escape_filter.h"

namespace wisp {

void EscapeFilter::filter(std::span<const std::uint8_t> in, std::vector<std::uint8_t>& out) {
  for (const std::uint8_t byte : in) {
    if (!escaped_) {
      escaped_ = byte == kKey;
      if (!escaped_) {
        out.push_back(byte);
      }
      continue;
    }
    escaped_ = false;
    const std::function<void()>* action = nullptr;
    switch (byte) {
      case kKey:
        out.push_back(kKey);
        break;
      case 'x':
        action = &actions_.quit;
        break;
      case 'b':
        action = &actions_.send_break;
        break;
      case 'h':
      case '?':
        action = &actions_.help;
        break;
      default:
        break;
    }
    if (action != nullptr && *action) {
      (*action)();
    }
  }
}

}  // namespace wisp
