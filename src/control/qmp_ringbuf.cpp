// Commands for chardevs of kind ringbuf, with QEMU's meaning: a write goes to the end of the same ring that a
// read takes from, not to the guest.
#include <cstdint>
#include <optional>
#include <string>

#include "control/qmp_commands.h"

namespace wisp {
namespace {

constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// RFC 4648, with padding.
std::string encode_base64(std::string_view bytes) {
  std::string text;
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    const std::string_view group = bytes.substr(at, 3);
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      bits = (bits << 8) | (i < group.size() ? static_cast<std::uint8_t>(group[i]) : 0U);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      text += i <= group.size() ? kDigits[(bits >> (18 - 6 * i)) & 63] : '=';
    }
  }
  return text;
}

// Empty where the text is not base64 with its padding.
std::optional<std::string> decode_base64(std::string_view text) {
  if (text.size() % 4 != 0) {
    return std::nullopt;
  }
  const std::size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  text.remove_suffix(padding);
  std::string bytes;
  std::uint32_t bits = 0;
  std::uint32_t count = 0;
  for (const char c : text) {
    const std::size_t digit = kDigits.find(c);
    if (digit == std::string_view::npos) {
      return std::nullopt;
    }
    bits = (bits << 6) | static_cast<std::uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes += static_cast<char>((bits >> count) & 0xff);
    }
  }
  return bytes;
}

// Whether the arguments ask for base64 in place of utf8.
std::expected<bool, QmpError> wants_base64(const Json& arguments) {
  const std::string format = arguments.value("format", std::string("utf8"));
  if (format != "utf8" && format != "base64") {
    return qmp_fail("Parameter 'format' does not accept that value, expected utf8 or base64");
  }
  return format == "base64";
}

}  // namespace

QmpReply qmp_ringbuf_write(QmpContext& context, const Json& arguments) {
  const auto base64 = wants_base64(arguments);
  if (!base64) {
    return std::unexpected(base64.error());
  }
  std::optional<std::string> data = arguments["data"].get<std::string>();
  if (*base64) {
    data = decode_base64(*data);
  }
  if (!data) {
    return qmp_fail("Parameter 'data' is not base64");
  }
  return qmp_reply(context.machine.write_ring(arguments["device"].get<std::string>(), *data));
}

QmpReply qmp_ringbuf_read(QmpContext& context, const Json& arguments) {
  const auto base64 = wants_base64(arguments);
  if (!base64) {
    return std::unexpected(base64.error());
  }
  const Json& size = arguments["size"];
  if (!size.is_number_unsigned() || size.get<std::uint64_t>() == 0) {
    return qmp_fail("Parameter 'size' must be greater than zero");
  }
  auto data = context.machine.read_ring(arguments["device"].get<std::string>(), size.get<std::uint64_t>());
  if (!data) {
    return qmp_fail(data.error().message);
  }
  return Json(*base64 ? encode_base64(*data) : *std::move(data));
}

}  // namespace wisp
