// Ethernet frames in scattered buffers.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace wisp {

// Destination, source and type.
inline constexpr std::size_t kMinFrameSize = 14;
// The longest frame: 64 KiB of IP packet (segmentation offload) behind an Ethernet header with a VLAN tag.
inline constexpr std::size_t kMaxFrameSize = 65535 + 18;
// Size of struct virtio_net_hdr_v1, which taps put in front of each frame.
inline constexpr std::size_t kVnetHeaderSize = 12;
// Most iovecs of one send() or receive(): leaves room for a header below the kernel's limit of 1024.
inline constexpr std::size_t kMaxFrameIovecs = 1020;

[[nodiscard]] std::size_t iovecs_size(std::span<const iovec> iovecs);

// Copies as many of the bytes as fit, from byte `offset` of the buffers on; returns how many.
std::size_t copy_to_iovecs(std::span<const std::uint8_t> bytes, std::span<const iovec> iovecs,
                           std::size_t offset = 0);
// Copies out of the buffers from byte `offset` on; returns how many bytes were there, at most out.size().
std::size_t copy_from_iovecs(std::span<const iovec> iovecs, std::size_t offset, std::span<std::uint8_t> out);

}  // namespace wisp
