#include "chardev/char_options.h"

#include <array>
#include <utility>

namespace wisp {
namespace {

constexpr auto kStdio = std::to_array<PropertySpec>({
    {.name = "mux",
     .kind = PropertyKind::kBool,
     .help = "control-A is an escape key: control-A x ends the machine, control-A h lists the others",
     .default_text = "off"},
    {.name = "signal",
     .kind = PropertyKind::kBool,
     .help = "control-C ends the process instead of reaching the guest",
     .default_text = "on without mux"},
});

constexpr auto kFile = std::to_array<PropertySpec>({
    {.name = "path", .help = "the file that takes what is written", .required = true, .maximum = 4095},
    {.name = "append",
     .kind = PropertyKind::kBool,
     .help = "keep what the file already has",
     .default_text = "off"},
});

constexpr auto kSocket = std::to_array<PropertySpec>({
    {.name = "path", .help = "path of a Unix socket", .maximum = 107},
    {.name = "host", .help = "numeric address of a TCP socket", .default_text = "127.0.0.1", .maximum = 64},
    {.name = "port",
     .kind = PropertyKind::kUint,
     .help = "port of a TCP socket",
     .minimum = 1,
     .maximum = 65535},
    {.name = "server",
     .kind = PropertyKind::kBool,
     .help = "listen for one client at a time; else connect",
     .default_text = "off"},
    {.name = "wait",
     .kind = PropertyKind::kBool,
     .help = "with server: the machine starts when the first client has come; nowait is wait=off",
     .default_text = "on"},
});

constexpr std::array<std::pair<std::string_view, CharKind>, 6> kKinds{{{"stdio", CharKind::kStdio},
                                                                       {"pty", CharKind::kPty},
                                                                       {"null", CharKind::kNull},
                                                                       {"file", CharKind::kFile},
                                                                       {"socket", CharKind::kSocket},
                                                                       {"ringbuf", CharKind::kRing}}};

}  // namespace

const std::span<const PropertySpec> kStdioCharProperties = kStdio;
const std::span<const PropertySpec> kFileCharProperties = kFile;
const std::span<const PropertySpec> kSocketCharProperties = kSocket;

Result<CharConfig> char_config(std::string_view kind, const std::string& id, const PropertySet& properties) {
  CharConfig config{.id = id};
  bool known = false;
  for (const auto& [name, value] : kKinds) {
    if (name == kind) {
      config.kind = value;
      known = true;
    }
  }
  if (!known) {
    return fail("chardev {}: '{}' is not a kind of chardev", id, kind);
  }
  config.path = properties.get_string("path");
  config.append = properties.get_bool("append", false);
  config.host = properties.get_string("host");
  config.port = static_cast<std::uint16_t>(properties.get_uint("port", 0));
  config.server = properties.get_bool("server", false);
  config.wait = properties.get_bool("wait", true);
  config.escape = properties.get_bool("mux", !properties.get_bool("signal", true));
  if (config.kind == CharKind::kSocket && config.path.empty() == (config.port == 0)) {
    return fail("chardev {}: a socket needs either path=, or port= with an optional host=", id);
  }
  return config;
}

}  // namespace wisp
