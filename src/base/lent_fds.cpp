#include "base/lent_fds.h"

#include <algorithm>

#include "base/checked.h"

namespace wisp {

bool holds_fds(std::string_view option) {
  return option == "fd" || option == "fds" || option == "vhostfd" || option == "vhostfds";
}

LentFds::LentFds(const PropertySet& properties, std::span<const int> more) {
  for (const int fd : more) {
    add(fd);
  }
  for (const auto& [name, value] : properties.values()) {
    const auto* text = std::get_if<std::string>(&value);
    if (text == nullptr || !holds_fds(name)) {
      continue;
    }
    for (std::string_view rest = *text; !rest.empty();) {
      const std::size_t colon = rest.find(':');
      const auto number = parse_uint(rest.substr(0, colon));
      if (const auto fd = number ? checked_cast<int>(*number) : std::nullopt) {
        add(*fd);
      }
      rest.remove_prefix(colon == std::string_view::npos ? rest.size() : colon + 1);
    }
  }
}

void LentFds::add(int fd) {
  if (std::ranges::find(fds_, fd, &UniqueFd::get) == fds_.end()) {
    fds_.emplace_back(fd);
  }
}

void LentFds::release() {
  for (UniqueFd& fd : fds_) {
    (void)fd.release();
  }
  fds_.clear();
}

}  // namespace wisp
