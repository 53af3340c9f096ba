#include "net/net_backend.h"

namespace wisp {

Result<void> NetBackend::set_offloads(const NetOffloads& offloads) {
  if (offloads != NetOffloads{}) {
    return fail("{} has no offloads", description());
  }
  return {};
}

Result<void> NetBackend::set_active_pairs(std::uint16_t pairs) {
  if (pairs == 0 || pairs > queue_pairs()) {
    return fail("{} has {} queue pairs, not {}", description(), queue_pairs(), pairs);
  }
  return {};
}

}  // namespace wisp
