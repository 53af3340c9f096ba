#include "virtio/vhost.h"

#include <sys/ioctl.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "virtio/vhost_abi.h"

namespace wisp {
namespace {

constexpr std::uint64_t kLogAll = 1ULL << VHOST_F_LOG_ALL;

std::uint64_t host_address(const GuestSlice& slice) {
  return reinterpret_cast<std::uint64_t>(slice.as_iovec().iov_base);
}

bool is_tracked(const GuestMemory& memory) {
  return std::ranges::any_of(memory.blocks(),
                             [](const GuestMemoryBlock& block) { return block.dirty != nullptr; });
}

}  // namespace

Result<void> VhostKernel::call_raw(unsigned long request, void* argument, const char* what) {
  if (::ioctl(fd_.get(), request, argument) < 0) {
    return fail_errno(errno, "{}: {} failed", path_, what);
  }
  return {};
}

Result<std::unique_ptr<VhostKernel>> VhostKernel::create(UniqueFd fd, std::string path) {
  std::unique_ptr<VhostKernel> vhost(new VhostKernel(std::move(fd), std::move(path)));
  if (::ioctl(vhost->fd(), VHOST_GET_FEATURES, &vhost->features_) < 0) {
    return fail_errno(errno, "fd {} is not an opened {}", vhost->fd(), vhost->path_);
  }
  if (::ioctl(vhost->fd(), VHOST_SET_OWNER, nullptr) < 0) {
    if (errno == EBUSY) {
      return fail("fd {} ({}) is in use by another machine", vhost->fd(), vhost->path_);
    }
    return fail_errno(errno, "cannot take over fd {} ({})", vhost->fd(), vhost->path_);
  }
  if ((vhost->features_ & kVhostNeededFeatures) != kVhostNeededFeatures) {
    return fail("{} lacks features {:#x} of virtio 1, a newer kernel is needed", vhost->path_,
                kVhostNeededFeatures & ~vhost->features_);
  }
  return vhost;
}

Result<void> VhostKernel::configure(std::uint64_t negotiated, const GuestMemory& memory) {
  const auto blocks = memory.blocks();
  logging_ = (features_ & kLogAll) != 0 && is_tracked(memory);
  std::uint64_t features = (negotiated & features_) | (logging_ ? kLogAll : 0);
  if (logging_) {
    const std::uint64_t end = blocks.empty() ? 0 : blocks.back().gpa + blocks.back().size;
    log_.assign(static_cast<std::size_t>((end / kPageSize + 63) / 64), 0);
    auto base = reinterpret_cast<std::uint64_t>(log_.data());
    WISP_TRY(call(VHOST_SET_LOG_BASE, &base, "VHOST_SET_LOG_BASE"));
  }
  WISP_TRY(call(VHOST_SET_FEATURES, &features, "VHOST_SET_FEATURES"));

  std::vector<std::uint64_t> storage((sizeof(vhost_memory) + blocks.size() * sizeof(vhost_memory_region)) /
                                     sizeof(std::uint64_t));
  static_assert(sizeof(vhost_memory) % sizeof(std::uint64_t) == 0 &&
                sizeof(vhost_memory_region) % sizeof(std::uint64_t) == 0);
  const std::uint64_t header = blocks.size();  // nregions, then padding
  storage[0] = header;
  std::size_t at = sizeof(vhost_memory) / sizeof(std::uint64_t);
  for (const GuestMemoryBlock& block : blocks) {
    const vhost_memory_region region{.guest_phys_addr = block.gpa,
                                     .memory_size = block.size,
                                     .userspace_addr = reinterpret_cast<std::uint64_t>(block.host),
                                     .flags_padding = 0};
    std::memcpy(&storage[at], &region, sizeof region);
    at += sizeof region / sizeof(std::uint64_t);
  }
  return call(VHOST_SET_MEM_TABLE, storage.data(), "VHOST_SET_MEM_TABLE");
}

Result<void> VhostKernel::start_queue(std::uint32_t index, const Queue& queue, int kick_fd, int call_fd,
                                      int error_fd) {
  const QueueConfig& config = queue.config();
  const std::uint64_t size = config.size;
  const auto descriptors = queue.memory().slice(config.descriptor_table, 16 * size);
  const auto available = queue.memory().slice(config.available_ring, 6 + 2 * size);
  const auto used = queue.memory().slice(config.used_ring, 6 + 8 * size);
  if (!descriptors || !available || !used) {
    return fail("queue {} does not lie in guest memory", index);
  }
  vhost_vring_state number{.index = index, .num = config.size};
  WISP_TRY(call(VHOST_SET_VRING_NUM, &number, "VHOST_SET_VRING_NUM"));
  vhost_vring_state base{.index = index, .num = queue.next_available()};
  WISP_TRY(call(VHOST_SET_VRING_BASE, &base, "VHOST_SET_VRING_BASE"));
  vhost_vring_addr address{.index = index,
                           .flags = logging_ ? 1U << VHOST_VRING_F_LOG : 0U,
                           .desc_user_addr = host_address(*descriptors),
                           .used_user_addr = host_address(*used),
                           .avail_user_addr = host_address(*available),
                           .log_guest_addr = config.used_ring};
  WISP_TRY(call(VHOST_SET_VRING_ADDR, &address, "VHOST_SET_VRING_ADDR"));
  vhost_vring_file kick{.index = index, .fd = kick_fd};
  WISP_TRY(call(VHOST_SET_VRING_KICK, &kick, "VHOST_SET_VRING_KICK"));
  vhost_vring_file interrupt{.index = index, .fd = call_fd};
  WISP_TRY(call(VHOST_SET_VRING_CALL, &interrupt, "VHOST_SET_VRING_CALL"));
  vhost_vring_file error{.index = index, .fd = error_fd};
  return call(VHOST_SET_VRING_ERR, &error, "VHOST_SET_VRING_ERR");
}

Result<void> VhostKernel::stop_queue(std::uint32_t index, Queue& queue) {
  vhost_vring_state base{.index = index, .num = 0};
  WISP_TRY(call(VHOST_GET_VRING_BASE, &base, "VHOST_GET_VRING_BASE"));
  queue.set_next_available(static_cast<std::uint16_t>(base.num));
  for (const unsigned long request : {VHOST_SET_VRING_KICK, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR}) {
    vhost_vring_file none{.index = index, .fd = -1};
    WISP_TRY(call(request, &none, "taking an eventfd back"));
  }
  return {};
}

void VhostKernel::collect_dirty(const GuestMemory& memory) {
  if (!is_tracked(memory)) {
    return;
  }
  if (!logging_) {
    // Tracking began after the queues were handed over: all that the kernel could have written counts.
    for (const GuestMemoryBlock& block : memory.blocks()) {
      memory.mark_dirty(block.gpa, block.size);
    }
    return;
  }
  for (std::size_t i = 0; i < log_.size(); ++i) {
    std::uint64_t word = __atomic_exchange_n(&log_[i], 0, __ATOMIC_ACQ_REL);
    while (word != 0) {
      const auto bit = static_cast<std::uint64_t>(std::countr_zero(word));
      word &= word - 1;
      memory.mark_dirty((i * 64 + bit) * kPageSize, kPageSize);
    }
  }
}

}  // namespace wisp
