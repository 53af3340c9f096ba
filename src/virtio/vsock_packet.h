// Packets of the socket device (virtio 1.2, section 5.10.6).
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/bytes.h"

namespace wisp {

inline constexpr std::uint64_t kVsockHostCid = 2;
inline constexpr std::uint64_t kVsockMinGuestCid = 3;
inline constexpr std::uint64_t kVsockMaxGuestCid = 0xffff'fffe;

inline constexpr std::uint16_t kVsockTypeStream = 1;

enum class VsockOp : std::uint16_t {
  kInvalid = 0,
  kRequest = 1,
  kResponse = 2,
  kRst = 3,
  kShutdown = 4,
  kRw = 5,
  kCreditUpdate = 6,
  kCreditRequest = 7,
};

// Flags of kShutdown: the sender will not receive, will not send any more.
inline constexpr std::uint32_t kVsockNoReceive = 1;
inline constexpr std::uint32_t kVsockNoSend = 2;

inline constexpr std::size_t kVsockHeaderSize = 44;

struct VsockHeader {
  std::uint64_t src_cid = 0;
  std::uint64_t dst_cid = 0;
  std::uint32_t src_port = 0;
  std::uint32_t dst_port = 0;
  std::uint32_t length = 0;  // of the payload
  std::uint16_t type = kVsockTypeStream;
  VsockOp op = VsockOp::kInvalid;
  std::uint32_t flags = 0;
  std::uint32_t buf_alloc = 0;  // the sender's receive buffer, in bytes
  std::uint32_t fwd_cnt = 0;    // how many received bytes the sender has used up, modulo 2^32

  [[nodiscard]] static VsockHeader parse(std::span<const std::uint8_t, kVsockHeaderSize> bytes) {
    const std::uint8_t* at = bytes.data();
    return {.src_cid = load_le<std::uint64_t>(at),
            .dst_cid = load_le<std::uint64_t>(at + 8),
            .src_port = load_le<std::uint32_t>(at + 16),
            .dst_port = load_le<std::uint32_t>(at + 20),
            .length = load_le<std::uint32_t>(at + 24),
            .type = load_le<std::uint16_t>(at + 28),
            .op = static_cast<VsockOp>(load_le<std::uint16_t>(at + 30)),
            .flags = load_le<std::uint32_t>(at + 32),
            .buf_alloc = load_le<std::uint32_t>(at + 36),
            .fwd_cnt = load_le<std::uint32_t>(at + 40)};
  }

  [[nodiscard]] std::array<std::uint8_t, kVsockHeaderSize> bytes() const {
    std::array<std::uint8_t, kVsockHeaderSize> out{};
    store_le(&out[0], src_cid);
    store_le(&out[8], dst_cid);
    store_le(&out[16], src_port);
    store_le(&out[20], dst_port);
    store_le(&out[24], length);
    store_le(&out[28], type);
    store_le(&out[30], static_cast<std::uint16_t>(op));
    store_le(&out[32], flags);
    store_le(&out[36], buf_alloc);
    store_le(&out[40], fwd_cnt);
    return out;
  }
};

}  // namespace wisp
