#include "base/property.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <system_error>

#include "base/checked.h"

namespace wisp {
namespace {

Result<PropertyValue> within(const PropertySpec& spec, std::string_view text,
                             std::optional<std::uint64_t> number, std::string_view what) {
  if (!number) {
    return fail("'{}' is not {}", text, what);
  }
  if (*number < spec.minimum || *number > spec.maximum) {
    return fail("'{}' is out of range, expected {} to {}", text, spec.minimum, spec.maximum);
  }
  return PropertyValue(*number);
}

}  // namespace

bool PropertySet::get_bool(std::string_view name, bool otherwise) const {
  const auto found = values_.find(name);
  return found != values_.end() ? std::get<bool>(found->second) : otherwise;
}

std::uint64_t PropertySet::get_uint(std::string_view name, std::uint64_t otherwise) const {
  return find_uint(name).value_or(otherwise);
}

std::string PropertySet::get_string(std::string_view name, std::string otherwise) const {
  const auto found = values_.find(name);
  if (found != values_.end()) {
    return std::get<std::string>(found->second);
  }
  return otherwise;
}

std::optional<std::uint64_t> PropertySet::find_uint(std::string_view name) const {
  const auto found = values_.find(name);
  return found != values_.end() ? std::optional(std::get<std::uint64_t>(found->second)) : std::nullopt;
}

std::optional<std::string> PropertySet::find_string(std::string_view name) const {
  const auto found = values_.find(name);
  return found != values_.end() ? std::optional(std::get<std::string>(found->second)) : std::nullopt;
}

const PropertySpec* find_property(std::span<const PropertySpec> specs, std::string_view name) {
  for (const PropertySpec& spec : specs) {
    if (spec.name == name) {
      return &spec;
    }
  }
  return nullptr;
}

std::optional<std::uint64_t> parse_uint(std::string_view text) {
  int base = 10;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    base = 16;
    text.remove_prefix(2);
  }
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc{} || end != text.data() + text.size()) {
    return std::nullopt;
  }
  return value;
}

std::optional<std::uint64_t> parse_size(std::string_view text, std::uint64_t default_unit) {
  if (text.ends_with("iB")) {
    text.remove_suffix(2);
  } else if (text.ends_with('B')) {
    text.remove_suffix(1);
  }
  std::uint64_t unit = default_unit;
  if (!text.empty()) {
    static constexpr std::array<std::pair<char, std::uint64_t>, 4> kUnits{
        {{'k', 1ULL << 10}, {'m', 1ULL << 20}, {'g', 1ULL << 30}, {'t', 1ULL << 40}}};
    const char last = static_cast<char>(text.back() | 0x20);
    for (const auto& [letter, factor] : kUnits) {
      if (letter == last) {
        unit = factor;
        text.remove_suffix(1);
        break;
      }
    }
  }
  const auto number = parse_uint(text);
  return number ? checked_mul(*number, unit) : std::nullopt;
}

std::optional<bool> parse_bool(std::string_view text) {
  if (text == "on" || text == "true" || text == "yes") {
    return true;
  }
  if (text == "off" || text == "false" || text == "no") {
    return false;
  }
  return std::nullopt;
}

std::optional<std::array<std::uint8_t, 6>> parse_mac_bytes(std::string_view text) {
  std::array<std::uint8_t, 6> bytes{};
  if (text.size() != bytes.size() * 3 - 1) {
    return std::nullopt;
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const std::string_view digits = text.substr(i * 3, 2);
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), bytes[i], 16);
    if (error != std::errc{} || end != digits.end() || (i != 0 && text[i * 3 - 1] != ':')) {
      return std::nullopt;
    }
  }
  return bytes;
}

Result<std::vector<int>> parse_fds(std::string_view text) {
  constexpr std::size_t kMost = 64;
  std::vector<int> fds;
  for (std::string_view rest = text;;) {
    const std::size_t colon = rest.find(':');
    const auto number = parse_uint(rest.substr(0, colon));
    const auto fd = number ? checked_cast<int>(*number) : std::nullopt;
    if (!fd) {
      return fail("'{}' is not a list of file descriptors such as 4 or 4:5", text.substr(0, 80));
    }
    if (std::ranges::find(fds, *fd) != fds.end()) {
      return fail("file descriptor {} is given twice", *fd);
    }
    if (fds.size() == kMost) {
      return fail("more than {} file descriptors", kMost);
    }
    fds.push_back(*fd);
    if (colon == std::string_view::npos) {
      return fds;
    }
    rest.remove_prefix(colon + 1);
  }
}

bool is_choice(std::string_view choices, std::string_view text) {
  while (!choices.empty()) {
    const std::size_t bar = choices.find('|');
    if (choices.substr(0, bar) == text) {
      return true;
    }
    choices = bar == std::string_view::npos ? std::string_view{} : choices.substr(bar + 1);
  }
  return false;
}

Result<PropertyValue> parse_property(const PropertySpec& spec, std::string_view text) {
  switch (spec.kind) {
    case PropertyKind::kBool: {
      const auto value = parse_bool(text);
      if (!value) {
        return fail("'{}' is not on or off", text);
      }
      return PropertyValue(*value);
    }
    case PropertyKind::kUint:
      return within(spec, text, parse_uint(text), "a number");
    case PropertyKind::kSize:
      return within(spec, text, parse_size(text), "a size such as 64K, 512M or 2G");
    case PropertyKind::kString:
      if (text.size() > spec.maximum) {
        return fail("'{}' is longer than {} characters", text.substr(0, 80), spec.maximum);
      }
      return PropertyValue(std::string(text));
    case PropertyKind::kEnum:
      if (!is_choice(spec.choices, text)) {
        return fail("'{}' is not one of {}", text, spec.choices);
      }
      return PropertyValue(std::string(text));
    case PropertyKind::kMac:
      if (!parse_mac_bytes(text)) {
        return fail("'{}' is not a MAC address such as 52:54:00:12:34:56", text);
      }
      return PropertyValue(std::string(text));
  }
  return fail("'{}' has a kind that this program does not know", spec.name);
}

}  // namespace wisp
