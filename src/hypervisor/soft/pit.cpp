#include "hypervisor/soft/pit.h"

#include <algorithm>

namespace wisp::soft {
namespace {

constexpr std::uint64_t kFrequency = 1'193'182;
constexpr std::uint64_t kNsPerSecond = 1'000'000'000;

std::uint64_t ticks_to_ns(std::uint64_t ticks) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(ticks) * kNsPerSecond + kFrequency - 1) /
                                    kFrequency);
}

std::uint32_t from_bcd(std::uint32_t value) {
  return (value & 0xf) + 10 * ((value >> 4) & 0xf) + 100 * ((value >> 8) & 0xf) + 1000 * ((value >> 12) & 0xf);
}
std::uint16_t to_bcd(std::uint32_t value) {
  value %= 10000;
  return static_cast<std::uint16_t>((value % 10) | (value / 10 % 10) << 4 | (value / 100 % 10) << 8 |
                                    (value / 1000) << 12);
}

// Modes that reload by themselves: rate generator and square wave.
bool periodic(std::uint8_t mode) { return mode == 2 || mode == 3; }

}  // namespace

std::uint64_t Pit::elapsed_ticks(const Channel& channel) const {
  if (!channel.counting || !channel.gate) {
    return 0;
  }
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(now_ns_() - channel.start_ns) * kFrequency /
                                    kNsPerSecond);
}

std::uint16_t Pit::count(const Channel& channel) const {
  const std::uint64_t ticks = elapsed_ticks(channel);
  std::uint64_t left = 0;
  if (channel.mode == 2) {
    left = channel.reload - ticks % channel.reload;
  } else if (channel.mode == 3) {
    left = channel.reload - ticks * 2 % channel.reload;
  } else {
    const std::uint64_t span = channel.bcd ? 10000 : 0x10000;
    left = (channel.reload + span - ticks % span) % span;
  }
  return channel.bcd ? to_bcd(static_cast<std::uint32_t>(left)) : static_cast<std::uint16_t>(left);
}

bool Pit::output(const Channel& channel) const {
  if (!channel.counting) {
    return channel.mode != 0;
  }
  const std::uint64_t ticks = elapsed_ticks(channel);
  switch (channel.mode) {
    case 2:
      return ticks % channel.reload != channel.reload - 1;
    case 3:
      return ticks % channel.reload < (channel.reload + 1) / 2;
    case 4:
    case 5:
      return ticks != channel.reload;
    default:
      return ticks >= channel.reload;
  }
}

void Pit::load_count(std::uint32_t index, std::uint32_t value) {
  Channel& channel = channels_[index];
  if (channel.bcd) {
    value = from_bcd(value);
  }
  channel.reload = value != 0 ? value : (channel.bcd ? 10000 : 0x10000);
  if (channel.mode == 3 || channel.mode == 2) {
    // A count of 1 is illegal there and would fire without end.
    channel.reload = std::max<std::uint32_t>(channel.reload, 2);
  }
  channel.counting = true;
  channel.start_ns = now_ns_();
  if (index == 0) {
    fired_periods_ = 0;
  }
}

void Pit::control(std::uint8_t value) {
  const std::uint32_t index = value >> 6;
  if (index == 3) {  // read-back
    for (std::uint32_t i = 0; i < 3; ++i) {
      if ((value & (2U << i)) == 0) {
        continue;
      }
      Channel& channel = channels_[i];
      if ((value & 0x20) == 0 && !channel.count_latched) {
        channel.latch = count(channel);
        channel.count_latched = true;
      }
      if ((value & 0x10) == 0 && !channel.status_latched) {
        channel.status = static_cast<std::uint8_t>((output(channel) ? 0x80 : 0) | (channel.counting ? 0 : 0x40) |
                                                   channel.access << 4 | channel.mode << 1 | (channel.bcd ? 1 : 0));
        channel.status_latched = true;
      }
    }
    return;
  }
  Channel& channel = channels_[index];
  const std::uint8_t access = (value >> 4) & 3;
  if (access == 0) {
    if (!channel.count_latched) {
      channel.latch = count(channel);
      channel.count_latched = true;
    }
    return;
  }
  const bool gate = channel.gate;
  channel = {};
  channel.gate = gate;
  channel.access = access;
  channel.bcd = (value & 1) != 0;
  const std::uint8_t mode = (value >> 1) & 7;
  channel.mode = mode > 5 ? mode & 3 : mode;
}

std::uint8_t Pit::read(std::uint16_t port) {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    return static_cast<std::uint8_t>((channels_[2].gate ? 1 : 0) | (speaker_ ? 2 : 0) |
                                     ((now_ns_() / 15'000) % 2 != 0 ? 0x10 : 0) | (output(channels_[2]) ? 0x20 : 0));
  }
  if (port == 0x43) {
    return 0xff;
  }
  Channel& channel = channels_[port & 3];
  if (channel.status_latched) {
    channel.status_latched = false;
    return channel.status;
  }
  const std::uint16_t value = channel.count_latched ? channel.latch : count(channel);
  const bool high = channel.access == 2 || (channel.access == 3 && channel.read_high_next);
  if (channel.access == 3) {
    channel.read_high_next = !channel.read_high_next;
  }
  if (channel.access != 3 || high) {
    channel.count_latched = false;
  }
  return static_cast<std::uint8_t>(high ? value >> 8 : value);
}

void Pit::write(std::uint16_t port, std::uint8_t value) {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    const bool gate = (value & 1) != 0;
    Channel& channel = channels_[2];
    if (gate && !channel.gate) {
      channel.start_ns = now_ns_();
    }
    channel.gate = gate;
    speaker_ = (value & 2) != 0;
    return;
  }
  if (port == 0x43) {
    control(value);
    return;
  }
  const std::uint32_t index = port & 3;
  Channel& channel = channels_[index];
  if (channel.access == 3 && !channel.write_high_next) {
    channel.write_low = value;
    channel.write_high_next = true;
    return;
  }
  channel.write_high_next = false;
  switch (channel.access) {
    case 1:
      load_count(index, value);
      break;
    case 2:
      load_count(index, static_cast<std::uint32_t>(value) << 8);
      break;
    default:
      load_count(index, static_cast<std::uint32_t>(value) << 8 | channel.write_low);
      break;
  }
}

std::optional<std::uint64_t> Pit::next_locked() const {
  const Channel& channel = channels_[0];
  if (!channel.counting || (!periodic(channel.mode) && fired_periods_ > 0)) {
    return std::nullopt;
  }
  return channel.start_ns + ticks_to_ns((fired_periods_ + 1) * channel.reload);
}

std::optional<std::uint64_t> Pit::next_event_ns() const {
  const std::lock_guard lock(mutex_);
  return next_locked();
}

void Pit::poll() {
  {
    const std::lock_guard lock(mutex_);
    const auto next = next_locked();
    if (!next || now_ns_() < *next) {
      return;
    }
    fired_periods_ = elapsed_ticks(channels_[0]) / channels_[0].reload;
    fired_periods_ = std::max<std::uint64_t>(fired_periods_, 1);
  }
  irq_();
}

void Pit::reset() {
  const std::lock_guard lock(mutex_);
  channels_ = {};
  channels_[2].gate = false;
  fired_periods_ = 0;
  speaker_ = false;
}

void Pit::save(StateWriter& writer) const {
  const std::lock_guard lock(mutex_);
  for (const Channel& channel : channels_) {
    for (const std::uint8_t value : {channel.mode, channel.access, channel.write_low, channel.status}) {
      writer.put(value);
    }
    for (const bool value : {channel.bcd, channel.gate, channel.counting, channel.write_high_next,
                             channel.read_high_next, channel.count_latched, channel.status_latched}) {
      writer.put(value);
    }
    writer.put(channel.latch);
    writer.put(channel.reload);
    // Times are kept as distances: the reader's clock has another start.
    writer.put(now_ns_() - channel.start_ns);
  }
  writer.put(fired_periods_);
  writer.put(speaker_);
}

Result<void> Pit::load(StateReader& reader) {
  const std::lock_guard lock(mutex_);
  for (Channel& channel : channels_) {
    WISP_ASSIGN(channel.mode, reader.get_at_most<std::uint8_t>(5, "8254 mode"));
    WISP_ASSIGN(channel.access, reader.get_at_most<std::uint8_t>(3, "8254 access mode"));
    WISP_ASSIGN(channel.write_low, reader.get<std::uint8_t>());
    WISP_ASSIGN(channel.status, reader.get<std::uint8_t>());
    for (bool* value : {&channel.bcd, &channel.gate, &channel.counting, &channel.write_high_next,
                        &channel.read_high_next, &channel.count_latched, &channel.status_latched}) {
      WISP_ASSIGN(*value, reader.get<bool>());
    }
    WISP_ASSIGN(channel.latch, reader.get<std::uint16_t>());
    WISP_ASSIGN(channel.reload, reader.get_at_most<std::uint32_t>(0x10000, "8254 count"));
    channel.reload = std::max<std::uint32_t>(channel.reload, 2);
    WISP_ASSIGN(const std::uint64_t age, reader.get<std::uint64_t>());
    const std::uint64_t now = now_ns_();
    channel.start_ns = now - std::min(age, now);
  }
  WISP_ASSIGN(fired_periods_, reader.get<std::uint64_t>());
  WISP_ASSIGN(speaker_, reader.get<bool>());
  return {};
}

}  // namespace wisp::soft
