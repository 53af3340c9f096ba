// -chardev and chardev-add: the options of each kind, and from checked options to a configuration.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/property.h"
#include "chardev/char_config.h"

namespace wisp {

// Options without `id`. Kinds without options have an empty span.
extern const std::span<const PropertySpec> kStdioCharProperties;
extern const std::span<const PropertySpec> kFileCharProperties;
extern const std::span<const PropertySpec> kSocketCharProperties;

// `kind` is stdio, pty, null, file, socket or ringbuf.
[[nodiscard]] Result<CharConfig> char_config(std::string_view kind, const std::string& id,
                                             const PropertySet& properties);

}  // namespace wisp
