#include "hypervisor/soft/pic.h"

#include <bit>

namespace wisp::soft {
namespace {

constexpr std::uint16_t kMasterPort = 0x20;
constexpr std::uint16_t kSlavePort = 0xa0;
constexpr std::uint16_t kLevelPort = 0x4d0;
constexpr std::uint8_t kCascade = 2;
// Inputs that are always edge-triggered: timer, keyboard, cascade; RTC and coprocessor.
constexpr std::array<std::uint8_t, 2> kLevelWritable = {0xf8, 0xde};

constexpr std::uint8_t bit_of(std::uint8_t input) {
  return static_cast<std::uint8_t>(1U << input);
}

// Place of the highest-priority set bit, counted from input `first`; 8 where none is set.
constexpr std::uint8_t rank(std::uint8_t bits, std::uint8_t first) {
  return static_cast<std::uint8_t>(std::countr_zero(std::rotr(bits, first)));
}

}  // namespace

void PicPair::Chip::set(std::uint8_t input, bool high) {
  const std::uint8_t bit = bit_of(input);
  if ((level_mode & bit) != 0) {
    request = static_cast<std::uint8_t>(high ? request | bit : request & ~bit);
  } else if (high && (lines & bit) == 0) {
    request |= bit;
  } else if (!high && (lines & bit) != 0) {
    // The 8259A wants the input high until it is acknowledged.
    request = static_cast<std::uint8_t>(request & ~bit);
  }
  lines = static_cast<std::uint8_t>(high ? lines | bit : lines & ~bit);
}

std::uint8_t PicPair::Chip::counted_service() const {
  return special_mask ? static_cast<std::uint8_t>(service & ~mask) : service;
}

void PicPair::Chip::set_level_mode(std::uint8_t inputs) {
  // An input that becomes level-triggered asks while it is high; one that becomes edge-triggered waits for
  // its next edge.
  const auto touched = static_cast<std::uint8_t>(inputs | level_mode);
  request = static_cast<std::uint8_t>((request & ~touched) | (lines & inputs));
  level_mode = inputs;
}

int PicPair::Chip::pending(bool master) const {
  const auto wants = static_cast<std::uint8_t>(request & ~mask);
  const std::uint8_t best = rank(wants, priority);
  if (best == 8) {
    return -1;
  }
  const int input = (best + priority) & 7;
  const std::uint8_t held = rank(counted_service(), priority);
  // Special fully nested: the slave may interrupt its own service with something more urgent.
  const bool nested = special_fully_nested && master && input == kCascade && best == held;
  return best < held || nested ? input : -1;
}

void PicPair::Chip::take(std::uint8_t input) {
  const std::uint8_t bit = bit_of(input);
  if (auto_eoi) {
    if (rotate_on_auto_eoi) {
      priority = (input + 1) & 7;
    }
  } else {
    service |= bit;
  }
  if ((level_mode & bit) == 0) {
    request = static_cast<std::uint8_t>(request & ~bit);
  }
}

void PicPair::Chip::command(std::uint8_t value) {
  if ((value & 0x10) != 0) {  // ICW1
    const std::uint8_t kept_lines = lines;
    const std::uint8_t kept_level = level_mode;
    *this = {};
    lines = kept_lines;
    level_mode = kept_level;
    request = static_cast<std::uint8_t>(lines & level_mode);
    init_step = 2;
    needs_icw4 = (value & 1) != 0;
    single = (value & 2) != 0;
    return;
  }
  if ((value & 0x08) != 0) {  // OCW3
    poll = (value & 4) != 0;
    if ((value & 2) != 0) {
      read_service = (value & 1) != 0;
    }
    if ((value & 0x40) != 0) {
      special_mask = (value & 0x20) != 0;
    }
    return;
  }
  const std::uint8_t operation = value >> 5;  // OCW2
  const std::uint8_t level = value & 7;
  switch (operation) {
    case 0:
    case 4:
      rotate_on_auto_eoi = operation == 4;
      break;
    case 1:
    case 5: {
      const std::uint8_t best = rank(counted_service(), priority);
      if (best != 8) {
        const auto input = static_cast<std::uint8_t>((best + priority) & 7);
        service = static_cast<std::uint8_t>(service & ~bit_of(input));
        if (operation == 5) {
          priority = (input + 1) & 7;
        }
      }
      break;
    }
    case 3:
      service = static_cast<std::uint8_t>(service & ~bit_of(level));
      break;
    case 6:
      priority = (level + 1) & 7;
      break;
    case 7:
      service = static_cast<std::uint8_t>(service & ~bit_of(level));
      priority = (level + 1) & 7;
      break;
    default:
      break;
  }
}

void PicPair::Chip::data(std::uint8_t value) {
  switch (init_step) {
    case 2:
      base = value & 0xf8;
      init_step = single ? (needs_icw4 ? 4 : 0) : 3;
      return;
    case 3:  // how the chips are joined: wired here
      init_step = needs_icw4 ? 4 : 0;
      return;
    case 4:
      special_fully_nested = (value & 0x10) != 0;
      auto_eoi = (value & 2) != 0;
      init_step = 0;
      return;
    default:
      mask = value;
      return;
  }
}

bool PicPair::owns(std::uint16_t port) {
  return (port & ~1U) == kMasterPort || (port & ~1U) == kSlavePort || (port & ~1U) == kLevelPort;
}

void PicPair::update() {
  // An edge for every new request: down first, so that a second one behind the first is seen.
  chips_[0].set(kCascade, false);
  chips_[0].set(kCascade, chips_[1].pending(false) >= 0);
}

template <typename Body>
void PicPair::change(Body body) {
  bool rose = false;
  {
    const std::lock_guard lock(mutex_);
    const bool was_high = chips_[0].pending(true) >= 0;
    body();
    update();
    rose = !was_high && chips_[0].pending(true) >= 0;
  }
  if (rose && wake_) {
    wake_();
  }
}

std::uint8_t PicPair::read(std::uint16_t port) {
  std::uint8_t value = 0xff;
  change([&] {
    if ((port & ~1U) == kLevelPort) {
      value = chips_[port & 1].level_mode;
      return;
    }
    Chip& chip = chips_[(port & ~1U) == kMasterPort ? 0 : 1];
    if (chip.poll) {
      chip.poll = false;
      const int input = chip.pending(&chip == chips_.data());
      value = 0;
      if (input >= 0) {
        chip.take(static_cast<std::uint8_t>(input));
        value = static_cast<std::uint8_t>(0x80 | input);
      }
    } else if ((port & 1) != 0) {
      value = chip.mask;
    } else {
      value = chip.read_service ? chip.service : chip.request;
    }
  });
  return value;
}

void PicPair::write(std::uint16_t port, std::uint8_t value) {
  change([&] {
    if ((port & ~1U) == kLevelPort) {
      chips_[port & 1].set_level_mode(value & kLevelWritable[port & 1]);
      return;
    }
    Chip& chip = chips_[(port & ~1U) == kMasterPort ? 0 : 1];
    if ((port & 1) != 0) {
      chip.data(value);
    } else {
      chip.command(value);
    }
  });
}

void PicPair::set_level(std::uint32_t irq, bool high) {
  if (irq < 16) {
    change([&] { chips_[irq >> 3].set(irq & 7, high); });
  }
}

void PicPair::pulse(std::uint32_t irq) {
  if (irq < 16) {
    change([&] {
      chips_[irq >> 3].set(irq & 7, false);
      chips_[irq >> 3].set(irq & 7, true);
    });
  }
}

bool PicPair::has_interrupt() const {
  const std::lock_guard lock(mutex_);
  return chips_[0].pending(true) >= 0;
}

std::uint8_t PicPair::acknowledge() {
  const std::lock_guard lock(mutex_);
  const std::uint8_t vector = acknowledge_locked();
  update();
  return vector;
}

std::uint8_t PicPair::acknowledge_locked() {
  const int input = chips_[0].pending(true);
  if (input < 0) {
    return static_cast<std::uint8_t>(chips_[0].base + 7);
  }
  if (input != kCascade) {
    chips_[0].take(static_cast<std::uint8_t>(input));
    return static_cast<std::uint8_t>(chips_[0].base + input);
  }
  const int slave_input = chips_[1].pending(false);
  chips_[0].take(kCascade);
  if (slave_input < 0) {
    return static_cast<std::uint8_t>(chips_[1].base + 7);
  }
  chips_[1].take(static_cast<std::uint8_t>(slave_input));
  return static_cast<std::uint8_t>(chips_[1].base + slave_input);
}

void PicPair::reset() {
  const std::lock_guard lock(mutex_);
  chips_ = {};
}

void PicPair::save(StateWriter& writer) const {
  const std::lock_guard lock(mutex_);
  for (const Chip& chip : chips_) {
    for (const std::uint8_t value : {chip.request, chip.service, chip.mask, chip.lines, chip.level_mode,
                                     chip.base, chip.priority, chip.init_step}) {
      writer.put(value);
    }
    for (const bool value : {chip.needs_icw4, chip.read_service, chip.poll, chip.special_mask, chip.auto_eoi,
                             chip.rotate_on_auto_eoi, chip.special_fully_nested, chip.single}) {
      writer.put(value);
    }
  }
}

Result<void> PicPair::load(StateReader& reader) {
  std::array<Chip, 2> chips;
  for (std::size_t i = 0; i < chips.size(); ++i) {
    Chip& chip = chips[i];
    for (std::uint8_t* value :
         {&chip.request, &chip.service, &chip.mask, &chip.lines, &chip.level_mode, &chip.base}) {
      WISP_ASSIGN(*value, reader.get<std::uint8_t>());
    }
    chip.level_mode &= kLevelWritable[i];
    chip.base &= 0xf8;
    WISP_ASSIGN(chip.priority, reader.get_at_most<std::uint8_t>(7, "8259 priority"));
    WISP_ASSIGN(chip.init_step, reader.get_at_most<std::uint8_t>(4, "8259 initialisation step"));
    if (chip.init_step == 1) {
      return fail("saved state has 8259 initialisation step 1, which does not exist");
    }
    for (bool* value : {&chip.needs_icw4, &chip.read_service, &chip.poll, &chip.special_mask, &chip.auto_eoi,
                        &chip.rotate_on_auto_eoi, &chip.special_fully_nested, &chip.single}) {
      WISP_ASSIGN(*value, reader.get<bool>());
    }
  }
  const std::lock_guard lock(mutex_);
  chips_ = chips;
  update();
  return {};
}

}  // namespace wisp::soft
