#include "hypervisor/soft/pit.h"

#include <algorithm>

namespace wisp::soft {
namespace {

// Products of times and frequencies do not fit 64 bits.
__extension__ typedef unsigned __int128 Wide;

__extension__ using Wide = Wide;
constexpr std::uint64_t kFrequency = 1'193'182;
constexpr std::uint64_t kNsPerSecond = 1'000'000'000;

std::uint64_t ticks_to_ns(std::uint64_t ticks) {
  return static_cast<std::uint64_t>((static_cast<Wide>(ticks) * kNsPerSecond + kFrequency - 1) / kFrequency);
}

std::uint32_t from_bcd(std::uint32_t value) {
  return (value & 0xf) + 10 * ((value >> 4) & 0xf) + 100 * ((value >> 8) & 0xf) +
         1000 * ((value >> 12) & 0xf);
}
std::uint16_t to_bcd(std::uint32_t value) {
  value %= 10000;
  return static_cast<std::uint16_t>((value % 10) | (value / 10 % 10) << 4 | (value / 100 % 10) << 8 |
                                    (value / 1000) << 12);
}

// Modes that reload by themselves: rate generator and square wave.
bool periodic(std::uint8_t mode) {
  return mode == 2 || mode == 3;
}

// Modes that a rising gate starts: one-shot and hardware-triggered strobe.
bool triggered_by_gate(std::uint8_t mode) {
  return mode == 1 || mode == 5;
}

}  // namespace

Pit::Pit(std::function<std::uint64_t()> now_ns, std::function<void()> irq)
    : now_ns_(std::move(now_ns)), irq_(std::move(irq)) {
  reset();
}

std::uint64_t Pit::elapsed_ticks(const Channel& channel) const {
  if (!channel.counting || (triggered_by_gate(channel.mode) && !channel.triggered)) {
    return 0;
  }
  if (!channel.gate && !triggered_by_gate(channel.mode)) {
    return channel.held_ticks;
  }
  return channel.held_ticks + static_cast<std::uint64_t>(static_cast<Wide>(now_ns_() - channel.start_ns) *
                                                         kFrequency / kNsPerSecond);
}

std::uint16_t Pit::count(const Channel& channel) const {
  const std::uint64_t ticks = elapsed_ticks(channel);
  std::uint64_t left = 0;
  if (channel.mode == 2) {
    left = channel.active - ticks % channel.active;
  } else if (channel.mode == 3) {
    // Counts down by two, twice a period, and shows even numbers only.
    left = (channel.active - ticks * 2 % channel.active) & ~1ULL;
  } else {
    const std::uint64_t span = channel.bcd ? 10000 : 0x10000;
    left = (channel.active + span - ticks % span) % span;
  }
  return channel.bcd ? to_bcd(static_cast<std::uint32_t>(left)) : static_cast<std::uint16_t>(left);
}

bool Pit::output(const Channel& channel) const {
  if (!channel.counting || (triggered_by_gate(channel.mode) && !channel.triggered)) {
    return channel.mode != 0;
  }
  const std::uint64_t ticks = elapsed_ticks(channel);
  switch (channel.mode) {
    case 2:
      return ticks % channel.active != channel.active - 1;
    case 3:
      return ticks % channel.active < (channel.active + 1) / 2;
    case 4:
    case 5:
      return ticks != channel.active;
    default:
      return ticks >= channel.active;
  }
}

void Pit::load_count(std::uint32_t index, std::uint32_t value) {
  Channel& channel = channels_[index];
  if (channel.bcd) {
    value = from_bcd(value);
  }
  channel.reload = value != 0 ? value : (channel.bcd ? 10000 : 0x10000);
  if (periodic(channel.mode)) {
    // A count of 1 is illegal there and would fire without end.
    channel.reload = std::max<std::uint32_t>(channel.reload, 2);
  }
  channel.counting = true;
  if (triggered_by_gate(channel.mode) && channel.triggered) {
    return;  // for the next trigger
  }
  channel.active = channel.reload;
  channel.held_ticks = 0;
  channel.start_ns = now_ns_();
  if (index == 0) {
    fired_periods_ = 0;
  }
}

void Pit::set_gate(Channel& channel, bool gate) {
  if (gate == channel.gate) {
    return;
  }
  const bool pauses = channel.mode == 0 || channel.mode == 4;
  if (!gate) {
    const std::uint64_t ticks = elapsed_ticks(channel);
    channel.gate = false;
    if (!triggered_by_gate(channel.mode)) {
      channel.held_ticks = pauses ? ticks : 0;
    }
    return;
  }
  channel.gate = true;
  if (!pauses) {
    channel.held_ticks = 0;
    channel.active = channel.reload;
    channel.triggered = channel.counting;
  }
  channel.start_ns = now_ns_();
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
        channel.status =
            static_cast<std::uint8_t>((output(channel) ? 0x80 : 0) | (channel.counting ? 0 : 0x40) |
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
  if (!owns(port)) {
    return 0xff;
  }
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    return static_cast<std::uint8_t>((channels_[2].gate ? 1 : 0) | (speaker_ ? 2 : 0) |
                                     ((now_ns_() / 15'000) % 2 != 0 ? 0x10 : 0) |
                                     (output(channels_[2]) ? 0x20 : 0));
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
  if (!owns(port)) {
    return;
  }
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    set_gate(channels_[2], (value & 1) != 0);
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
    if (channel.mode == 0) {
      channel.counting = false;  // the first byte stops the count and lowers the output
    }
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

std::optional<std::uint64_t> Pit::ticks_to_event() const {
  const Channel& channel = channels_[0];
  // Its gate is tied high, so that a mode that waits for the gate never starts.
  if (!channel.counting || triggered_by_gate(channel.mode) ||
      (!periodic(channel.mode) && fired_periods_ > 0)) {
    return std::nullopt;
  }
  return (fired_periods_ + 1) * channel.active;
}

std::optional<std::uint64_t> Pit::next_event_ns() const {
  const std::lock_guard lock(mutex_);
  const auto ticks = ticks_to_event();
  if (!ticks) {
    return std::nullopt;
  }
  // Distances, not times, are compared: the start of a restored period may lie before the clock's zero.
  const std::uint64_t due = ticks_to_ns(*ticks);
  const std::uint64_t now = now_ns_();
  const std::uint64_t elapsed = now - channels_[0].start_ns;
  return elapsed >= due ? now : now + (due - elapsed);
}

void Pit::poll() {
  {
    const std::lock_guard lock(mutex_);
    const auto due = ticks_to_event();
    const std::uint64_t elapsed = elapsed_ticks(channels_[0]);
    if (!due || elapsed < *due) {
      return;
    }
    fired_periods_ = elapsed / channels_[0].active;
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
    for (const bool value :
         {channel.bcd, channel.gate, channel.counting, channel.write_high_next, channel.read_high_next,
          channel.count_latched, channel.status_latched, channel.triggered}) {
      writer.put(value);
    }
    writer.put(channel.latch);
    writer.put(channel.reload);
    writer.put(channel.active);
    writer.put(channel.held_ticks);
    // Times are kept as distances: the reader's clock has another start.
    writer.put(now_ns_() - channel.start_ns);
  }
  writer.put(fired_periods_);
  writer.put(speaker_);
}

Result<void> Pit::load(StateReader& reader) {
  std::array<Channel, 3> channels{};
  const std::uint64_t now = now_ns_();
  for (Channel& channel : channels) {
    WISP_ASSIGN(channel.mode, reader.get_at_most<std::uint8_t>(5, "8254 mode"));
    WISP_ASSIGN(channel.access, reader.get_at_most<std::uint8_t>(3, "8254 access mode"));
    if (channel.access == 0) {
      return fail("saved state has 8254 access mode 0, which is a command and no mode");
    }
    WISP_ASSIGN(channel.write_low, reader.get<std::uint8_t>());
    WISP_ASSIGN(channel.status, reader.get<std::uint8_t>());
    for (bool* value :
         {&channel.bcd, &channel.gate, &channel.counting, &channel.write_high_next, &channel.read_high_next,
          &channel.count_latched, &channel.status_latched, &channel.triggered}) {
      WISP_ASSIGN(*value, reader.get<bool>());
    }
    WISP_ASSIGN(channel.latch, reader.get<std::uint16_t>());
    const std::uint32_t least = periodic(channel.mode) ? 2 : 1;
    for (std::uint32_t* value : {&channel.reload, &channel.active}) {
      WISP_ASSIGN(*value, reader.get_at_most<std::uint32_t>(0x10000, "8254 count"));
      if (*value < least) {
        return fail("saved state has 8254 count {}, less than {}", *value, least);
      }
    }
    WISP_ASSIGN(channel.held_ticks, reader.get_at_most<std::uint64_t>(1ULL << 62, "8254 ticks"));
    WISP_ASSIGN(const std::uint64_t age, reader.get<std::uint64_t>());
    channel.start_ns = now - age;
  }
  WISP_ASSIGN(const auto fired_periods, reader.get<std::uint64_t>());
  WISP_ASSIGN(const bool speaker, reader.get<bool>());
  // Channels 0 and 1 have their gate tied high, so that channel 0 holds no ticks.
  channels[0].gate = channels[1].gate = true;
  channels[0].held_ticks = 0;
  const std::lock_guard lock(mutex_);
  channels_ = channels;
  fired_periods_ = std::min(fired_periods, elapsed_ticks(channels_[0]) / channels_[0].active);
  speaker_ = speaker;
  return {};
}

}  // namespace wisp::soft
