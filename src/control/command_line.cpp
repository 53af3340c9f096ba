#include "control/command_line.h"

#include <algorithm>
#include <map>
#include <set>

#include "control/option_table.h"

namespace wisp {
namespace {

constexpr std::size_t kMaxArguments = 4096;
constexpr std::size_t kMaxArgumentLength = 1U << 20;

// "-name" or "--name" as "name"; empty where the argument is not an option.
std::string_view option_name(std::string_view argument) {
  if (argument.size() < 2 || argument[0] != '-') {
    return {};
  }
  return argument.substr(argument[1] == '-' ? 2 : 1);
}

bool is_known_option(std::string_view argument) {
  const std::string_view name = option_name(argument);
  return !name.empty() && find_option(name) != nullptr;
}

std::unexpected<Error> unknown_option(std::string_view argument) {
  const std::string_view name = option_name(argument);
  if (name.empty()) {
    return fail("'{}' is not an option; options start with '-', see wisp --help", clip(argument));
  }
  if (const std::string_view hint = foreign_option_hint(name); !hint.empty()) {
    return fail("unknown option '{}': {}", clip(argument), hint);
  }
  if (const std::size_t equals = name.find('='); equals != std::string_view::npos) {
    if (const OptionSpec* option = find_option(name.substr(0, equals)); option != nullptr) {
      return fail("unknown option '{}': write the value as its own word: -{} {}", clip(argument),
                  option->name, clip(name.substr(equals + 1), 80));
    }
  }
  std::vector<std::string_view> known;
  for (const OptionSpec& option : option_table()) {
    known.push_back(option.name);
  }
  const std::string_view near = nearest_word(name, known);
  if (near.empty()) {
    return fail("unknown option '{}'; wisp --help lists all options", clip(argument));
  }
  return fail("unknown option '{}'; did you mean '-{}'?", clip(argument), near);
}

// The value of `option` from the arguments at `next`, which moves past it.
Result<std::string> take_option_value(const OptionSpec& option, std::span<const std::string> arguments,
                                      std::size_t& next) {
  const bool here = next < arguments.size();
  switch (option.value) {
    case OptionValue::kNone:
      return std::string();
    case OptionValue::kOptional:
      return here && !arguments[next].starts_with('-') ? arguments[next++] : std::string();
    case OptionValue::kOne:
    case OptionValue::kSeveral:
      break;
  }
  if (!here) {
    return fail("-{} needs a value: -{} {}", option.name, option.name, option.argument);
  }
  if (is_known_option(arguments[next])) {
    return fail("-{} needs a value, but the option '{}' follows", option.name, arguments[next]);
  }
  std::string value = arguments[next++];
  if (option.value == OptionValue::kOne && value.empty()) {
    return fail("-{} needs a value, but an empty one is given", option.name);
  }
  while (option.value == OptionValue::kSeveral && next < arguments.size() &&
         !arguments[next].starts_with('-')) {
    value += ' ';
    value += arguments[next++];
  }
  return value;
}

bool asks_for_help(std::string_view value) {
  return value == "help" || value == "?";
}

// Answers "-device help" and "-device DRIVER,help" and their kin; empty where the value is not such a
// question.
std::optional<std::string> answer_help(const OptionSpec& option, const std::string& value,
                                       const DriverTables& tables) {
  std::string_view subject = value;
  if (subject.ends_with(",help") || subject.ends_with(",?")) {
    subject = subject.substr(0, subject.rfind(','));
  } else if (!asks_for_help(subject)) {
    return std::nullopt;
  }
  const bool whole = asks_for_help(subject);
  const std::string_view name = option.alias_of.empty() ? option.name : option.alias_of;
  if (const auto properties = fixed_properties(name); !properties.empty()) {
    return properties_help("-" + std::string(name), properties);
  }
  if (name == "drive") {
    const DriverInfo* info = find_driver(tables.drives, "");
    return properties_help("-drive id=ID",
                           info != nullptr ? info->properties : std::span<const PropertySpec>{});
  }
  std::vector<DriverInfo> drivers;
  if (name == "device") {
    drivers.assign(tables.devices.begin(), tables.devices.end());
  } else if (name == "netdev") {
    drivers.assign(tables.netdevs.begin(), tables.netdevs.end());
  } else if (name == "chardev" || name == "serial") {
    drivers.assign(tables.chardevs.begin(), tables.chardevs.end());
  } else if (name == "object") {
    drivers.assign(own_object_kinds().begin(), own_object_kinds().end());
    drivers.insert(drivers.end(), tables.objects.begin(), tables.objects.end());
  } else {
    return std::nullopt;
  }
  if (!whole) {
    const DriverInfo* info = find_driver(drivers, subject);
    return info != nullptr ? std::optional(properties_help(fmt::format("-{} {},id=ID", name, info->name),
                                                           info->properties))
                           : std::nullopt;
  }
  return drivers_help("-" + std::string(name), drivers);
}

}  // namespace

std::string what_of(const OptionSpec& option, std::string_view value) {
  return value.empty() ? fmt::format("-{}", option.name) : fmt::format("-{} '{}'", option.name, clip(value));
}

Result<CommandLine> parse_command_line(std::span<const std::string> arguments, const DriverTables& tables) {
  if (arguments.size() > kMaxArguments) {
    return fail("{} words on the command line are too many, expected at most {}", arguments.size(),
                kMaxArguments);
  }
  CommandLineBuilder builder(tables);
  std::map<std::string_view, std::string_view> seen;  // canonical name -> as written
  for (std::size_t next = 0; next < arguments.size();) {
    const std::string& argument = arguments[next++];
    if (argument.size() > kMaxArgumentLength) {
      return fail("a word of {} bytes on the command line is too long", argument.size());
    }
    const OptionSpec* option = is_known_option(argument) ? find_option(option_name(argument)) : nullptr;
    if (option == nullptr) {
      return unknown_option(argument);
    }
    WISP_ASSIGN(const std::string value, take_option_value(*option, arguments, next));
    if (auto help = answer_help(*option, value, tables)) {
      return CommandLine{
          .action = CommandAction::kPrint, .text = *std::move(help), .launch = {}, .warnings = {}};
    }
    if (!option->repeatable) {
      const auto [earlier, first] =
          seen.emplace(option->alias_of.empty() ? option->name : option->alias_of, argument);
      if (!first && option->value != OptionValue::kNone) {
        return fail("{} is given twice; give it once", argument);
      }
    }
    if (auto taken = option->handler(builder, *option, value); !taken) {
      // Splitting errors do not know the option yet.
      const std::string& message = taken.error().message;
      return message.starts_with('-') ? fail("{}", message) : fail("-{}: {}", option->name, message);
    }
    if (builder.print) {
      return CommandLine{
          .action = CommandAction::kPrint, .text = *std::move(builder.print), .launch = {}, .warnings = {}};
    }
  }
  WISP_TRY(finish_command_line(builder));
  return CommandLine{.action = CommandAction::kRun,
                     .text = {},
                     .launch = std::move(builder.launch),
                     .warnings = std::move(builder.warnings)};
}

}  // namespace wisp
