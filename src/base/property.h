// The options of a device or back end as data: one table says name, kind, range, default and help; command
// line and QMP parse against it, help prints it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"

namespace wisp {

enum class PropertyKind : std::uint8_t {
  kBool,    // on|off, true|false, yes|no
  kUint,    // decimal or 0x hexadecimal within [minimum, maximum]
  kSize,    // a number with K, M, G or T behind it; bytes
  kString,  // at most `maximum` bytes
  kEnum,    // one of the words in `choices`, separated by '|'
  kMac,     // aa:bb:cc:dd:ee:ff
};

struct PropertySpec {
  std::string_view name;
  PropertyKind kind = PropertyKind::kString;
  std::string_view help;
  bool required = false;
  std::string_view default_text = {};  // what help shows; the default itself stands in the options struct
  std::uint64_t minimum = 0;
  std::uint64_t maximum = UINT64_MAX;
  std::string_view choices = {};
  // Accepted for compatibility but without effect: a value other than the default gives a warning with this
  // text.
  std::string_view ignored_because = {};
  // Where not empty, the option may be given several times: its value is all of them with this in between.
  // Strings only.
  std::string_view joined_by = {};
};

using PropertyValue = std::variant<bool, std::uint64_t, std::string>;

// Values that were checked against their specs.
class PropertySet final {
 public:
  void set(std::string name, PropertyValue value) { values_[std::move(name)] = std::move(value); }
  [[nodiscard]] bool has(std::string_view name) const { return values_.contains(name); }
  [[nodiscard]] bool get_bool(std::string_view name, bool otherwise) const;
  [[nodiscard]] std::uint64_t get_uint(std::string_view name, std::uint64_t otherwise) const;
  [[nodiscard]] std::string get_string(std::string_view name, std::string otherwise = {}) const;
  [[nodiscard]] std::optional<std::uint64_t> find_uint(std::string_view name) const;
  [[nodiscard]] std::optional<std::string> find_string(std::string_view name) const;
  [[nodiscard]] const std::map<std::string, PropertyValue, std::less<>>& values() const { return values_; }

 private:
  std::map<std::string, PropertyValue, std::less<>> values_;
};

[[nodiscard]] const PropertySpec* find_property(std::span<const PropertySpec> specs, std::string_view name);
// Parses the text of one value; the error says what was expected ("expected on or off").
[[nodiscard]] Result<PropertyValue> parse_property(const PropertySpec& spec, std::string_view text);

// Numbers as users write them; the whole text must be used up.
[[nodiscard]] std::optional<std::uint64_t> parse_uint(std::string_view text);
// Bytes: "64", "64k", "512M", "2G", "1T", in upper or lower case, with "iB" or "B" behind or not. A number
// without a letter counts in units of `default_unit` bytes.
[[nodiscard]] std::optional<std::uint64_t> parse_size(std::string_view text, std::uint64_t default_unit = 1);
[[nodiscard]] std::optional<bool> parse_bool(std::string_view text);
// "52:54:00:12:34:56".
[[nodiscard]] std::optional<std::array<std::uint8_t, 6>> parse_mac_bytes(std::string_view text);
// Descriptor numbers as fd= and fds= take them: "4", "4:5". At most 64, none twice.
[[nodiscard]] Result<std::vector<int>> parse_fds(std::string_view text);
// Whether `text` is one of the words in "a|b|c".
[[nodiscard]] bool is_choice(std::string_view choices, std::string_view text);

}  // namespace wisp
