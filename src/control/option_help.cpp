// --help and the reference pages, made from the tables.
#include <algorithm>
#include <array>

#include "control/command_line.h"
#include "control/option_table.h"

namespace wisp {
namespace {

constexpr std::string_view kVersion = WISP_VERSION;
constexpr std::size_t kWidth = 96;

struct GroupTitle {
  OptionGroup group;
  std::string_view title;
};
constexpr auto kGroups = std::to_array<GroupTitle>({
    {OptionGroup::kBoot, "What to start"},
    {OptionGroup::kMachine, "The machine"},
    {OptionGroup::kDisk, "Disks"},
    {OptionGroup::kNetwork, "Network"},
    {OptionGroup::kConsole, "Console"},
    {OptionGroup::kDevice, "Devices"},
    {OptionGroup::kControl, "Control"},
    {OptionGroup::kProcess, "The process"},
});

constexpr std::string_view kExample =
    "  wisp -kernel vmlinux -append \"console=ttyS0 root=/dev/vda\" -m 512M -smp 2 \\\n"
    "    -drive id=rootfs,file=rootfs.img -device virtio-blk-device,drive=rootfs,id=blk0 \\\n"
    "    -netdev user,id=net0 -device virtio-net-device,netdev=net0,id=nic0 \\\n"
    "    -serial stdio -qmp unix:qmp.sock,server,nowait\n";

// Breaks `text` at spaces so that no line passes kWidth where that can be helped.
void wrap(std::string& out, std::string_view text, std::size_t indent) {
  std::size_t column = 0;
  while (!text.empty()) {
    const std::size_t space = text.find(' ');
    const std::string_view word = text.substr(0, space);
    text = space == std::string_view::npos ? std::string_view{} : text.substr(space + 1);
    if (column == 0 || column + 1 + word.size() > kWidth) {
      out += (column == 0 ? "" : "\n") + std::string(indent, ' ');
      column = indent;
    } else {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
  }
  out += '\n';
}

std::string kind_text(const PropertySpec& spec) {
  switch (spec.kind) {
    case PropertyKind::kBool:
      return "on|off";
    case PropertyKind::kUint:
      return spec.maximum == UINT64_MAX ? fmt::format("number from {}", spec.minimum)
                                        : fmt::format("{} to {}", spec.minimum, spec.maximum);
    case PropertyKind::kSize:
      return "size";
    case PropertyKind::kString:
      return "text";
    case PropertyKind::kEnum:
      return std::string(spec.choices);
    case PropertyKind::kMac:
      return "MAC address";
  }
  return {};
}

void property_rows(std::string& out, std::span<const PropertySpec> properties) {
  for (const PropertySpec& spec : properties) {
    std::string help(spec.help);
    if (!spec.ignored_because.empty()) {
      help = fmt::format("accepted, but ignored: {}", spec.ignored_because);
    } else if (spec.required) {
      help += " (required)";
    } else if (!spec.default_text.empty()) {
      help += fmt::format(" (default {})", spec.default_text);
    }
    out += fmt::format("  {:<24} {}\n", fmt::format("{}=", spec.name), kind_text(spec));
    wrap(out, help, 6);
  }
}

std::string markdown_cell(std::string_view text) {
  std::string cell;
  for (const char c : text) {
    if (c == '|') {
      cell += '\\';
    }
    cell += c;
  }
  return cell;
}

void markdown_properties(std::string& out, std::span<const PropertySpec> properties) {
  if (properties.empty()) {
    return;
  }
  out += "| option | value | default | meaning |\n|---|---|---|---|\n";
  for (const PropertySpec& spec : properties) {
    const std::string meaning = spec.ignored_because.empty()
                                    ? std::string(spec.help)
                                    : fmt::format("accepted, ignored: {}", spec.ignored_because);
    out += fmt::format("| `{}` | {} | {} | {} |\n", spec.name, markdown_cell(kind_text(spec)),
                       spec.required ? "required" : markdown_cell(spec.default_text), markdown_cell(meaning));
  }
  out += '\n';
}

std::string synopsis(const OptionSpec& option) {
  return option.argument.empty() ? fmt::format("-{}", option.name)
                                 : fmt::format("-{} {}", option.name, option.argument);
}

bool accepted_only(const OptionSpec& option) {
  return option.group == OptionGroup::kCompat && !option.example.empty();
}

}  // namespace

std::string_view program_version() {
  return kVersion;
}

std::string version_text() {
  return fmt::format("wisp {}\n", kVersion);
}

std::string help_text() {
  std::string out = "wisp runs a virtual machine. Start a kernel with a disk, a network and a console:\n\n";
  out += kExample;
  out +=
      "\nEnd it from the guest (poweroff), by Ctrl-C on a machine without a terminal of its own, or by QMP "
      "quit.\n"
      "'wisp doctor' tells what this host can do. Values are lists with ','; a comma inside a value is "
      "',,'.\n"
      "Every option may also be written with two dashes. -device help, -netdev help, -machine help and so "
      "on\n"
      "list what can stand inside a value.\n";
  for (const GroupTitle& group : kGroups) {
    out += fmt::format("\n{}:\n", group.title);
    for (const OptionSpec& option : option_table()) {
      if (option.group == group.group) {
        wrap(out, synopsis(option), 2);
        wrap(out, option.help, 6);
      }
    }
  }
  out += "\nAccepted without effect, for scripts written for other programs:\n";
  std::string words;
  for (const OptionSpec& option : option_table()) {
    if (accepted_only(option)) {
      words += fmt::format("{}-{}", words.empty() ? "" : " ", option.name);
    }
  }
  wrap(out, words, 2);
  out += "\nExit status: 0 the machine ended well; 1 it failed while running; 2 it could not start.\n";
  return out;
}

std::string properties_help(std::string_view title, std::span<const PropertySpec> properties) {
  std::string out = fmt::format("{}, and then:\n", title);
  property_rows(out, properties);
  return out;
}

std::string drivers_help(std::string_view title, std::span<const DriverInfo> drivers) {
  std::string out = fmt::format("{}, one of:\n", title);
  for (const DriverInfo& driver : drivers) {
    out += fmt::format("  {:<26} {}{}\n", driver.name, driver.help, driver.hotpluggable ? " (hotplug)" : "");
  }
  out += fmt::format("The options of one: {} NAME,help\n", title);
  return out;
}

std::string options_markdown() {
  std::string out =
      "# Options\n\n"
      "Made from the table in `src/control/option_table.cpp`; a test keeps this page equal to it.\n"
      "Every option may be written with one dash or two. Values are lists with `,`; a comma inside a value "
      "is "
      "`,,`.\n"
      "`-device help`, `-netdev help`, `-drive help` and so on print what can stand inside a value.\n\n"
      "```sh\n";
  out += kExample;
  out += "```\n";
  for (const GroupTitle& group : kGroups) {
    out += fmt::format("\n## {}\n\n", group.title);
    for (const OptionSpec& option : option_table()) {
      if (option.group != group.group) {
        continue;
      }
      out += fmt::format("### `-{}`\n\n    {}\n\n{}\n\n", option.name, synopsis(option), option.help);
      if (option.alias_of.empty()) {
        markdown_properties(out, fixed_properties(option.name));
      }
      if (option.name == "object") {
        for (const DriverInfo& kind : own_object_kinds()) {
          out += fmt::format("`{}`: {}\n\n", kind.name, kind.help);
          markdown_properties(out, kind.properties);
        }
      }
      out += fmt::format("Example: `{}`\n\n", option.example);
    }
  }
  out += "## Accepted without effect\n\nFor libvirt and for scripts written for QEMU or StratoVirt.\n\n";
  out += "| option | why |\n|---|---|\n";
  for (const OptionSpec& option : option_table()) {
    if (accepted_only(option)) {
      out += fmt::format("| `{}` | {} |\n", markdown_cell(synopsis(option)), markdown_cell(option.help));
    }
  }
  out += "\n## Refused\n\n| option | why |\n|---|---|\n";
  for (const OptionSpec& option : option_table()) {
    if (option.group == OptionGroup::kCompat && !accepted_only(option)) {
      out += fmt::format("| `-{}` | {} |\n", option.name, markdown_cell(option.help));
    }
  }
  return out;
}

std::string drivers_markdown(const DriverTables& tables) {
  std::string out =
      "# Devices and back ends\n\n"
      "Made from the tables that the program parses against; a test keeps this page equal to them.\n";
  struct Section {
    std::string_view title;
    std::string_view option;
    std::span<const DriverInfo> drivers;
  };
  for (const Section& section :
       {Section{"Devices", "device", tables.devices}, Section{"Drives", "drive", tables.drives},
        Section{"Networks", "netdev", tables.netdevs},
        Section{"Character devices", "chardev", tables.chardevs},
        Section{"Objects", "object", tables.objects}}) {
    out += fmt::format("\n## {}: `-{}`\n\n", section.title, section.option);
    for (const DriverInfo& driver : section.drivers) {
      if (!driver.name.empty()) {
        out += fmt::format("### `{}`\n\n", driver.name);
      }
      out += fmt::format("{}{}\n\n", driver.help, driver.hotpluggable ? " (may be added by QMP)" : "");
      markdown_properties(out, driver.properties);
    }
  }
  out +=
      "\n## In every machine\n\n"
      "A serial port (`-serial`), a clock, a keyboard controller that only resets, ACPI power control, and a "
      "boot timer: each byte that the guest writes to port 0x5f0 is logged with the time since the program's "
      "start. By convention 1 says that the kernel has started and 2 that init has.\n";
  return out;
}

}  // namespace wisp
