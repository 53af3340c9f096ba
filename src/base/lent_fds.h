// Descriptors that options give by number: the machine's from the moment on that it is given the options.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "base/property.h"
#include "base/unique_fd.h"

namespace wisp {

// Whether the option of this name holds descriptors: one number, or several with ':' between.
[[nodiscard]] bool holds_fds(std::string_view option);

// Closes what the options of one device or back end gave unless release() says that its part has it now, so
// that what fails before that leaves no descriptor open.
class LentFds final {
 public:
  // `more`: descriptors given beside the options; one that the options name too is held once.
  explicit LentFds(const PropertySet& properties, std::span<const int> more = {});

  void release();

 private:
  void add(int fd);

  std::vector<UniqueFd> fds_;
};

}  // namespace wisp
