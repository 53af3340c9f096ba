// Commands that change the machine: life cycle, descriptors, hotplug.
#include <algorithm>
#include <array>

#include "base/lent_fds.h"
#include "control/backend_options.h"
#include "control/qmp_commands.h"

namespace wisp {
namespace {

// The text of a JSON value as the tables parse it; empty for what cannot stand in an option.
std::optional<std::string> option_text(const Json& value) {
  if (value.is_string()) {
    return value.get<std::string>();
  }
  if (value.is_boolean()) {
    return value.get<bool>() ? "on" : "off";
  }
  if (value.is_number_unsigned()) {
    return std::to_string(value.get<std::uint64_t>());
  }
  if (value.is_number_integer()) {
    return std::to_string(value.get<std::int64_t>());
  }
  return std::nullopt;
}

// A list of strings, in QEMU's schema each as {"str": TEXT}: as if the option was given once for each.
std::optional<std::vector<std::string>> option_texts(const Json& value) {
  if (!value.is_array()) {
    auto text = option_text(value);
    return text ? std::optional(std::vector{*std::move(text)}) : std::nullopt;
  }
  std::vector<std::string> texts;
  for (const Json& element : value) {
    const auto text = element.is_object() && element.size() == 1 ? element.find("str") : element.end();
    if (text == element.end() || !text->is_string()) {
      return std::nullopt;
    }
    texts.push_back(text->get<std::string>());
  }
  return texts;
}

Result<std::vector<KeyValue>> pairs_of(const Json& arguments,
                                       std::initializer_list<std::string_view> except) {
  std::vector<KeyValue> pairs;
  for (const auto& [name, value] : arguments.items()) {
    if (std::ranges::find(except, std::string_view(name)) != except.end()) {
      continue;
    }
    auto texts = option_texts(value);
    if (!texts) {
      return fail(
          "Invalid parameter type for '{}', expected: string, number, boolean, or a list of {{\"str\": ...}}",
          clip(name, 80));
    }
    for (std::string& text : *texts) {
      pairs.push_back({.key = name, .value = std::move(text)});
    }
  }
  return pairs;
}

// Descriptors that options name, on their way into the machine: kept by the client until commit().
class FdLoan {
 public:
  explicit FdLoan(QmpFds& fds) : fds_(fds) {}

  // Replaces names that getfd gave by numbers, in the options that hold descriptors.
  Result<void> resolve(std::vector<KeyValue>& pairs) {
    for (KeyValue& pair : pairs) {
      if (holds_fds(pair.key)) {
        WISP_ASSIGN(pair.value, numbers_of(pair.key, pair.value));
      }
    }
    return {};
  }
  // The machine has them now.
  void commit() {
    for (const std::string& name : names_) {
      if (const auto found = fds_.named.find(name); found != fds_.named.end()) {
        (void)found->second.release();
        fds_.named.erase(found);
      }
    }
  }

 private:
  Result<std::string> numbers_of(std::string_view key, std::string_view text) {
    std::string numbers;
    if (!key.ends_with('s') && text.contains(':')) {
      return fail("Parameter '{}': '{}' names more than one file descriptor", key, clip(text, 80));
    }
    while (true) {
      const std::size_t colon = text.find(':');
      const std::string name(text.substr(0, colon));
      const auto found = fds_.named.find(name);
      if (found == fds_.named.end()) {
        return fail("Parameter '{}': file descriptor named '{}' has not been found; send it with getfd", key,
                    clip(name, 80));
      }
      if (std::ranges::find(names_, name) != names_.end()) {
        return fail("Parameter '{}': file descriptor named '{}' is given twice", key, clip(name, 80));
      }
      names_.push_back(name);
      numbers += (numbers.empty() ? "" : ":") + std::to_string(found->second.get());
      if (colon == std::string_view::npos) {
        return numbers;
      }
      text = text.substr(colon + 1);
    }
  }

  QmpFds& fds_;
  std::vector<std::string> names_;
};

// Drops `key` where its value is what a microVM has anyway or where it says nothing for one.
void drop_keys(std::vector<KeyValue>& pairs, std::initializer_list<std::string_view> keys) {
  std::erase_if(pairs, [&](const KeyValue& pair) { return std::ranges::find(keys, pair.key) != keys.end(); });
}

bool has_key(const std::vector<KeyValue>& pairs, std::string_view key) {
  return std::ranges::find(pairs, key, &KeyValue::key) != pairs.end();
}

// Moves a string out of a JSON object into pairs under another name.
Result<void> take_string(const Json& object, const char* name, std::string_view as,
                         std::vector<KeyValue>& pairs) {
  const auto found = object.find(name);
  if (found == object.end()) {
    return {};
  }
  const auto text = option_text(*found);
  if (!text) {
    return fail("Invalid parameter type for '{}', expected: string", name);
  }
  if (has_key(pairs, as)) {
    return fail("Parameter '{}' is given twice", name);
  }
  pairs.push_back({.key = std::string(as), .value = *text});
  return {};
}

// "driver" and "filename" of a protocol node: a file or a block device of the host.
Result<void> take_file_node(const Json& node, std::vector<KeyValue>& pairs) {
  for (const auto& [name, value] : node.items()) {
    if (name != "driver" && name != "filename" && name != "aio" && name != "locking" && name != "node-name") {
      return fail("Parameter 'file.{}' is unexpected", clip(name, 80));
    }
  }
  const auto driver = node.find("driver");
  if (driver != node.end() && *driver != "file" && *driver != "host_device") {
    return fail("Parameter 'file.driver' does not accept value '{}', expected file or host_device",
                clip(driver->dump(-1, ' ', true, Json::error_handler_t::replace), 80));
  }
  if (!node.contains("filename")) {
    return fail("Parameter 'file.filename' is missing");
  }
  WISP_TRY(take_string(node, "filename", "file", pairs));
  return take_string(node, "aio", "aio", pairs);
}

Result<std::vector<KeyValue>> drive_pairs(const Json& arguments) {
  WISP_ASSIGN(auto pairs, pairs_of(arguments, {"node-name", "driver", "file", "filename", "read-only",
                                               "cache", "aio", "media", "options", "id"}));
  WISP_TRY(take_string(arguments, "node-name", "id", pairs));
  WISP_TRY(take_string(arguments, "read-only", "readonly", pairs));
  WISP_TRY(take_string(arguments, "media", "media", pairs));
  const std::string driver = arguments.value("driver", std::string("raw"));
  const auto file = arguments.find("file");
  if (driver == "file" || driver == "host_device") {
    if (file != arguments.end()) {
      return fail("Parameter 'file' is unexpected with driver '{}'", driver);
    }
    if (!arguments.contains("filename")) {
      return fail("Parameter 'filename' is missing");
    }
    WISP_TRY(take_string(arguments, "filename", "file", pairs));
    WISP_TRY(take_string(arguments, "aio", "aio", pairs));
  } else {
    pairs.push_back({.key = "format", .value = driver});
    if (file == arguments.end()) {
      return fail("Parameter 'file' is missing");
    }
    if (!file->is_object()) {
      return fail("Parameter 'file' must be an object with driver and filename; nodes are not stacked here");
    }
    WISP_TRY(take_file_node(*file, pairs));
    WISP_TRY(take_string(arguments, "aio", "aio", pairs));
  }
  if (const auto cache = arguments.find("cache"); cache != arguments.end()) {
    for (const auto& [name, value] : cache->items()) {
      if ((name != "direct" && name != "no-flush") || !value.is_boolean()) {
        return fail("Parameter 'cache.{}' is unexpected, expected direct and no-flush as booleans",
                    clip(name, 80));
      }
    }
    if (cache->value("no-flush", false)) {
      return fail("Parameter 'cache.no-flush': a drive always keeps what the guest flushed; use false");
    }
    WISP_TRY(take_string(*cache, "direct", "direct", pairs));
  }
  return pairs;
}

// {"type": "unix", "data": {"path": P}} or the flat {"type": "unix", "path": P}.
Result<void> take_address(const Json& address, std::vector<KeyValue>& pairs) {
  const auto found = address.is_object() ? address.find("type") : address.end();
  const std::string type = found != address.end() && found->is_string() ? found->get<std::string>() : "";
  if (type != "unix" && type != "inet") {
    return fail("Parameter 'addr.type' must be unix or inet");
  }
  const auto nested = address.find("data");
  const Json& data = nested != address.end() ? *nested : address;
  if (!data.is_object()) {
    return fail("Invalid parameter type for 'addr.data', expected: object");
  }
  if (type == "unix") {
    return take_string(data, "path", "path", pairs);
  }
  WISP_TRY(take_string(data, "host", "host", pairs));
  return take_string(data, "port", "port", pairs);
}

Result<BackendConfig> chardev_config(QmpContext& context, const Json& arguments,
                                     std::vector<std::string>& warnings) {
  const Json& backend = arguments["backend"];
  const auto type = backend.find("type");
  if (type == backend.end() || !type->is_string()) {
    return fail("Parameter 'backend.type' is missing");
  }
  static const Json kNothing = Json::object();
  const auto given = backend.find("data");
  const Json& data = given != backend.end() ? *given : kNothing;
  if (!data.is_object()) {
    return fail("Invalid parameter type for 'backend.data', expected: object");
  }
  WISP_ASSIGN(auto pairs, pairs_of(data, {"addr", "out"}));
  WISP_TRY(take_string(data, "out", "path", pairs));
  if (const auto address = data.find("addr"); address != data.end()) {
    WISP_TRY(take_address(*address, pairs));
    if (!has_key(pairs, "server")) {
      pairs.push_back({.key = "server", .value = "on"});  // QEMU's default here
    }
  }
  WISP_TRY(take_string(arguments, "id", "id", pairs));
  const auto& kind = type->get_ref<const std::string&>();
  if (kind == "socket" && !has_key(pairs, "wait") && !has_key(pairs, "nowait")) {
    pairs.push_back({.key = "wait", .value = "off"});  // and here
  }
  WISP_ASSIGN(BackendConfig config,
              make_chardev(kind, std::move(pairs), context.tables, "chardev-add", warnings));
  if (config.properties.get_bool("wait", false)) {
    return fail("Parameter 'wait' must be false: a machine that runs cannot be held up for a client");
  }
  return config;
}

void log_warnings(QmpContext& context, const std::vector<std::string>& warnings) {
  for (const std::string& warning : warnings) {
    context.log.warning("QMP: {}", clip(warning, 400));
  }
}

// StratoVirt's names for hotplug, "virtio-blk-mmio", mean the same device.
std::string device_name(const std::string& driver) {
  return driver.ends_with("-mmio") ? driver.substr(0, driver.size() - 4) + "device" : driver;
}

}  // namespace

QmpReply qmp_capabilities(QmpContext&, const Json& arguments) {
  const auto enable = arguments.find("enable");
  if (enable != arguments.end() && (!enable->is_array() || !enable->empty())) {
    return qmp_fail("Parameter 'enable' must be an empty list: no capability is offered");
  }
  return Json::object();
}

QmpReply qmp_stop(QmpContext& context, const Json&) {
  return qmp_reply(context.machine.pause());
}

QmpReply qmp_cont(QmpContext& context, const Json&) {
  return qmp_reply(context.machine.resume());
}

QmpReply qmp_system_powerdown(QmpContext& context, const Json&) {
  return qmp_reply(context.machine.powerdown());
}

QmpReply qmp_system_reset(QmpContext& context, const Json&) {
  return qmp_reply(context.machine.reset());
}

QmpReply qmp_quit(QmpContext& context, const Json&) {
  context.after_reply = [&machine = context.machine] { machine.quit(ShutdownReason::kHostQuit); };
  return Json::object();
}

QmpReply qmp_balloon(QmpContext& context, const Json& arguments) {
  const Json& value = arguments["value"];
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() == 0) {
    return qmp_fail("Parameter 'value' expects a size in bytes above 0");
  }
  const auto done = context.machine.set_balloon(value.get<std::uint64_t>());
  if (!done && !context.machine.balloon()) {
    return std::unexpected(
        QmpError{.error_class = QmpErrorClass::kDeviceNotActive, .text = done.error().message});
  }
  return qmp_reply(done);
}

QmpReply qmp_getfd(QmpContext& context, const Json& arguments) {
  const auto& name = arguments["fdname"].get_ref<const std::string&>();
  QmpFds& fds = context.fds;
  if (fds.arrived.empty()) {
    return qmp_fail("No file descriptor supplied via SCM_RIGHTS");
  }
  UniqueFd fd = std::move(fds.arrived.front());
  fds.arrived.erase(fds.arrived.begin());
  const bool starts_with_digit = !name.empty() && name[0] >= '0' && name[0] <= '9';
  if (starts_with_digit || !check_id(name, "getfd") || name.contains(':')) {
    return qmp_fail(
        fmt::format("Parameter 'fdname': '{}' must be a name of letters, digits, '-', '_' and '.' that "
                    "does not start with a digit",
                    clip(name, 80)));
  }
  if (fds.named.size() >= QmpFds::kMaxNamed && !fds.named.contains(name)) {
    return qmp_fail(
        fmt::format("{} file descriptors are kept already; close some with closefd", QmpFds::kMaxNamed));
  }
  fds.named[name] = std::move(fd);
  return Json::object();
}

QmpReply qmp_closefd(QmpContext& context, const Json& arguments) {
  const auto& name = arguments["fdname"].get_ref<const std::string&>();
  if (context.fds.named.erase(name) == 0) {
    return qmp_fail(fmt::format("File descriptor named '{}' not found", clip(name, 80)));
  }
  return Json::object();
}

QmpReply qmp_blockdev_add(QmpContext& context, const Json& arguments) {
  auto pairs = drive_pairs(arguments);
  if (!pairs) {
    return qmp_fail(pairs.error().message);
  }
  std::vector<std::string> warnings;
  const auto drive = make_drive(*std::move(pairs), context.tables, "blockdev-add", warnings);
  if (!drive) {
    return qmp_fail(drive.error().message);
  }
  log_warnings(context, warnings);
  return qmp_reply(context.machine.add_drive(*drive));
}

QmpReply qmp_blockdev_del(QmpContext& context, const Json& arguments) {
  const auto& id = arguments["node-name"].get_ref<const std::string&>();
  QmpReply reply = qmp_reply(context.machine.remove_drive(id));
  if (reply) {
    context.drives_of_devices.erase(id);
  }
  return reply;
}

QmpReply qmp_netdev_add(QmpContext& context, const Json& arguments) {
  const std::string kind = arguments.value("type", std::string("tap"));
  auto pairs = pairs_of(arguments, {"type"});
  if (!pairs) {
    return qmp_fail(pairs.error().message);
  }
  FdLoan loan(context.fds);
  if (auto resolved = loan.resolve(*pairs); !resolved) {
    return qmp_fail(resolved.error().message);
  }
  std::vector<std::string> warnings;
  const auto netdev = make_netdev(kind, *std::move(pairs), context.tables, "netdev_add", warnings);
  if (!netdev) {
    return qmp_fail(netdev.error().message);
  }
  log_warnings(context, warnings);
  loan.commit();
  return qmp_reply(context.machine.add_netdev(*netdev));
}

QmpReply qmp_netdev_del(QmpContext& context, const Json& arguments) {
  return qmp_reply(context.machine.remove_netdev(arguments["id"].get<std::string>()));
}

QmpReply qmp_chardev_add(QmpContext& context, const Json& arguments) {
  std::vector<std::string> warnings;
  const auto chardev = chardev_config(context, arguments, warnings);
  if (!chardev) {
    return qmp_fail(chardev.error().message);
  }
  log_warnings(context, warnings);
  if (!find_driver(context.tables.chardevs, chardev->kind)->hotpluggable) {
    return qmp_fail(fmt::format("Character device '{}' can not be added later; give it on the command line",
                                chardev->kind));
  }
  if (auto added = context.machine.add_chardev(*chardev); !added) {
    return qmp_fail(added.error().message);
  }
  Json reply = Json::object();
  if (chardev->kind == "pty") {
    for (const ChardevInfo& info : context.machine.chardevs()) {
      if (info.id == chardev->id && info.description.starts_with("pty:")) {
        reply["pty"] = info.description.substr(4);
      }
    }
  }
  return reply;
}

QmpReply qmp_chardev_remove(QmpContext& context, const Json& arguments) {
  return qmp_reply(context.machine.remove_chardev(arguments["id"].get<std::string>()));
}

QmpReply qmp_device_add(QmpContext& context, const Json& arguments) {
  const auto& asked = arguments["driver"].get_ref<const std::string&>();
  const std::string driver = device_name(asked);
  auto pairs = pairs_of(arguments, {"driver"});
  if (!pairs) {
    return qmp_fail(pairs.error().message);
  }
  const std::string id = arguments["id"].get<std::string>();
  const bool strato = driver != asked;
  if (strato) {
    // There the back end has the device's id, and addr= names a slot; here the slot is chosen.
    const std::string_view backend = driver == "virtio-blk-device" ? "drive" : "netdev";
    if (!has_key(*pairs, backend) && (backend == "drive" || driver == "virtio-net-device")) {
      pairs->push_back({.key = std::string(backend), .value = id});
    }
    drop_keys(*pairs, {"addr", "lun"});
  }
  FdLoan loan(context.fds);
  if (auto resolved = loan.resolve(*pairs); !resolved) {
    return qmp_fail(resolved.error().message);
  }
  std::vector<std::string> warnings;
  const auto device = make_device(driver, *std::move(pairs), context.tables, "device_add", warnings);
  if (!device) {
    return qmp_fail(device.error().message);
  }
  log_warnings(context, warnings);
  if (!find_driver(context.tables.devices, driver)->hotpluggable) {
    return qmp_fail(fmt::format("Device '{}' can not be hotplugged; give it on the command line", driver));
  }
  loan.commit();
  if (auto added = context.machine.add_device(*device); !added) {
    return qmp_fail(added.error().message);
  }
  if (strato && device->properties.get_string("drive") == id) {
    context.drives_of_devices.insert(id);
  }
  return Json::object();
}

QmpReply qmp_device_del(QmpContext& context, const Json& arguments) {
  // All that can be wrong with it is that it is not there.
  if (auto removed = context.machine.remove_device(arguments["id"].get<std::string>()); !removed) {
    return std::unexpected(
        QmpError{.error_class = QmpErrorClass::kDeviceNotFound, .text = std::move(removed).error().message});
  }
  return Json::object();
}

}  // namespace wisp
