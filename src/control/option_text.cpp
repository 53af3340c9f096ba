#include "control/option_text.h"

#include <algorithm>
#include <cctype>
#include <numeric>
#include <utility>

namespace wisp {
namespace {

constexpr std::size_t kMaxIdLength = 127;
constexpr std::size_t kMaxSuggestedWord = 64;
constexpr std::size_t kMaxListed = 30;

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

bool is_switch(const PropertySpec* spec) {
  return spec != nullptr && spec->kind == PropertyKind::kBool;
}

// What a pair says to the table: the property, and the text to parse for it.
struct Setting {
  const PropertySpec* spec = nullptr;
  std::string text;
};

// `server` is server=on, `nowait` is wait=off, `nowait=on` is wait=off.
Setting resolve(const KeyValue& pair, std::span<const PropertySpec> specs) {
  if (const PropertySpec* spec = find_property(specs, pair.key); spec != nullptr) {
    if (!pair.bare) {
      return {spec, pair.value};
    }
    return is_switch(spec) ? Setting{spec, "on"} : Setting{spec, {}};
  }
  if (pair.key.starts_with("no")) {
    const PropertySpec* spec = find_property(specs, std::string_view(pair.key).substr(2));
    const auto value = pair.bare ? std::optional(true) : parse_bool(pair.value);
    if (is_switch(spec) && value) {
      return {spec, *value ? "off" : "on"};
    }
  }
  return {};
}

Result<void> accept_compat(const CompatOption& option, const KeyValue& pair, std::string_view what,
                           std::vector<std::string>& warnings) {
  if (!option.refusal.empty()) {
    return fail("{}: option '{}': {}", what, pair.key, option.refusal);
  }
  if (!option.accepted.empty() && !is_choice(option.accepted, pair.value)) {
    return fail("{}: option '{}': '{}' is not supported, expected {}", what, pair.key, clip(pair.value, 80),
                option.accepted);
  }
  if (!option.warning.empty()) {
    warnings.push_back(fmt::format("{}: option '{}' is ignored: {}", what, pair.key, option.warning));
  }
  return {};
}

std::vector<std::string_view> names_of(std::span<const PropertySpec> specs) {
  std::vector<std::string_view> names;
  for (const PropertySpec& spec : specs) {
    names.push_back(spec.name);
  }
  return names;
}

}  // namespace

Result<std::vector<KeyValue>> split_options(std::string_view text, std::string_view implied_key) {
  std::vector<KeyValue> pairs;
  std::size_t at = 0;
  while (at <= text.size()) {
    KeyValue pair;
    bool in_value = false;
    for (; at < text.size(); ++at) {
      const char c = text[at];
      if (c == ',') {
        if (at + 1 >= text.size() || text[at + 1] != ',') {
          break;
        }
        ++at;
      }
      if (c == '=' && !in_value) {
        in_value = true;
        continue;
      }
      (in_value ? pair.value : pair.key) += c;
    }
    ++at;  // past the comma, or past the end
    if (pair.key.empty()) {
      return fail("'{}' has an empty part; write one ',' between options and ',,' for a comma in a value",
                  clip(text));
    }
    if (!in_value && pairs.empty() && !implied_key.empty()) {
      pair = {.key = std::string(implied_key), .value = std::move(pair.key)};
    } else {
      pair.bare = !in_value;
    }
    pairs.push_back(std::move(pair));
  }
  return pairs;
}

Result<PropertySet> parse_properties(std::span<const KeyValue> pairs, std::span<const PropertySpec> specs,
                                     std::span<const CompatOption> compat, std::string_view what,
                                     std::vector<std::string>& warnings) {
  PropertySet set;
  for (const KeyValue& pair : pairs) {
    const Setting setting = resolve(pair, specs);
    if (setting.spec == nullptr) {
      const auto known = std::ranges::find(compat, std::string_view(pair.key), &CompatOption::name);
      if (known == compat.end()) {
        return fail("{}: unknown option '{}'{}", what, clip(pair.key, 80),
                    suggest(pair.key, names_of(specs)));
      }
      WISP_TRY(accept_compat(*known, pair, what, warnings));
      continue;
    }
    const PropertySpec& spec = *setting.spec;
    if (set.has(spec.name) && spec.joined_by.empty()) {
      return fail("{}: option '{}' is given twice", what, spec.name);
    }
    if (pair.bare && !is_switch(&spec)) {
      return fail("{}: option '{}' needs a value: {}=...", what, spec.name, spec.name);
    }
    auto value = parse_property(spec, setting.text);
    if (!value) {
      return fail("{}: option '{}': {}", what, spec.name, clip(value.error().message, 200));
    }
    // One who asks for what is so anyway loses nothing.
    if (!spec.ignored_because.empty() && !set.has(spec.name) && setting.text != spec.default_text) {
      warnings.push_back(
          fmt::format("{}: option '{}' is ignored: {}", what, spec.name, spec.ignored_because));
    }
    if (set.has(spec.name)) {
      *value =
          fmt::format("{}{}{}", set.get_string(spec.name), spec.joined_by, std::get<std::string>(*value));
    }
    set.set(std::string(spec.name), *std::move(value));
  }
  for (const PropertySpec& spec : specs) {
    if (spec.required && !set.has(spec.name)) {
      return fail("{}: option '{}' is missing ({})", what, spec.name, spec.help);
    }
  }
  return set;
}

Result<std::string> take_value(std::vector<KeyValue>& pairs, std::string_view key, std::string_view what) {
  std::string value;
  bool seen = false;
  for (auto pair = pairs.begin(); pair != pairs.end();) {
    if (pair->key != key) {
      ++pair;
      continue;
    }
    if (seen) {
      return fail("{}: option '{}' is given twice", what, key);
    }
    if (pair->bare || pair->value.empty()) {
      return fail("{}: option '{}' needs a value: {}=...", what, key, key);
    }
    seen = true;
    value = std::move(pair->value);
    pair = pairs.erase(pair);
  }
  return value;
}

Result<void> check_id(std::string_view id, std::string_view what) {
  const auto allowed = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || std::string_view("-_.:").contains(c);
  };
  if (id.empty() || id.size() > kMaxIdLength || !std::ranges::all_of(id, allowed)) {
    return fail("{}: id '{}' is not usable, expected 1 to {} letters, digits, '-', '_', '.' or ':'", what,
                clip(id, 80), kMaxIdLength);
  }
  return {};
}

std::string_view nearest_word(std::string_view word, std::span<const std::string_view> candidates) {
  if (word.size() > kMaxSuggestedWord) {
    return {};
  }
  std::string_view best;
  std::size_t best_distance = std::max<std::size_t>(1, word.size() / 3) + 1;
  for (const std::string_view candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

std::string suggest(std::string_view word, std::span<const std::string_view> candidates) {
  if (const std::string_view best = nearest_word(word, candidates); !best.empty()) {
    return fmt::format("; did you mean '{}'?", best);
  }
  if (candidates.empty()) {
    return {};
  }
  const bool all = candidates.size() <= kMaxListed;
  return "; known: " + join(all ? candidates : candidates.first(kMaxListed), ", ") + (all ? "" : ", ...");
}

std::string join(std::span<const std::string_view> words, std::string_view separator) {
  std::string text;
  for (const std::string_view word : words) {
    if (!text.empty()) {
      text += separator;
    }
    text += word;
  }
  return text;
}

std::string clip(std::string_view text, std::size_t limit) {
  std::string clipped(text.substr(0, limit));
  std::ranges::replace_if(
      clipped, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  return text.size() > limit ? clipped + "..." : clipped;
}

}  // namespace wisp
