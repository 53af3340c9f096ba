#include "devices/rtc.h"

#include <algorithm>
#include <utility>

namespace wisp {
namespace {

constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr std::uint32_t kDaySeconds = 86'400;
constexpr std::int64_t kDay = kDaySeconds;

constexpr std::uint8_t kSeconds = 0x0;
constexpr std::uint8_t kSecondsAlarm = 0x1;
constexpr std::uint8_t kMinutes = 0x2;
constexpr std::uint8_t kMinutesAlarm = 0x3;
constexpr std::uint8_t kHours = 0x4;
constexpr std::uint8_t kHoursAlarm = 0x5;
constexpr std::uint8_t kWeekday = 0x6;
constexpr std::uint8_t kDayOfMonth = 0x7;
constexpr std::uint8_t kMonth = 0x8;
constexpr std::uint8_t kYear = 0x9;
constexpr std::uint8_t kControlA = 0xa;
constexpr std::uint8_t kControlB = 0xb;
constexpr std::uint8_t kControlC = 0xc;
constexpr std::uint8_t kControlD = 0xd;

constexpr std::uint8_t kAUpdateInProgress = 1U << 7;
constexpr std::uint8_t kADividerMask = 7U << 4;
constexpr std::uint8_t kADividerRunning = 2U << 4;
constexpr std::uint8_t kARateMask = 0x0f;
constexpr std::uint8_t kARate1024 = 6;

constexpr std::uint8_t kBSet = 1U << 7;
constexpr std::uint8_t kBPeriodic = 1U << 6;
constexpr std::uint8_t kBAlarm = 1U << 5;
constexpr std::uint8_t kBUpdate = 1U << 4;
constexpr std::uint8_t kBInterrupts = kBPeriodic | kBAlarm | kBUpdate;
constexpr std::uint8_t kBSquareWave = 1U << 3;
constexpr std::uint8_t kBBinary = 1U << 2;
constexpr std::uint8_t kB24Hours = 1U << 1;

// Register C has its flags where register B has the bits that enable them.
constexpr std::uint8_t kCInterrupt = 1U << 7;

constexpr std::uint8_t kDValid = 1U << 7;
constexpr std::uint8_t kPm = 1U << 7;
constexpr std::uint8_t kAlarmAny = 0xc0;

// The update takes the last 244 us of each second.
constexpr std::uint64_t kUpdateNs = 244'000;
// How long a timer may run before the clock is looked at again: the host's time of day may be set.
constexpr std::uint64_t kLongestTimer = 3600 * kSecond;
// Far beyond what the registers can say (year 9999), far below what arithmetic can hold.
constexpr std::int64_t kOffsetLimit = 1'000'000'000'000;

struct Date {
  std::int64_t year = 0;
  std::uint32_t month = 0;  // 1-12
  std::uint32_t day = 0;    // 1-31
};

// Days since 1970-01-01 in the Gregorian calendar, for years counted from March so that the leap day is the
// last.
std::int64_t days_of(const Date& date) {
  const std::int64_t year = date.month <= 2 ? date.year - 1 : date.year;
  const std::int64_t era = (year >= 0 ? year : year - 399) / 400;
  const std::int64_t year_of_era = year - era * 400;
  const std::int64_t month_from_march = (static_cast<std::int64_t>(date.month) + 9) % 12;
  const std::int64_t day_of_year = (153 * month_from_march + 2) / 5 + static_cast<std::int64_t>(date.day) - 1;
  return era * 146'097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719'468;
}

Date date_of(std::int64_t days) {
  const std::int64_t shifted = days + 719'468;
  const std::int64_t era = (shifted >= 0 ? shifted : shifted - 146'096) / 146'097;
  const std::int64_t day_of_era = shifted - era * 146'097;
  const std::int64_t year_of_era =
      (day_of_era - day_of_era / 1460 + day_of_era / 36'524 - day_of_era / 146'096) / 365;
  const std::int64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
  const std::int64_t month_from_march = (5 * day_of_year + 2) / 153;
  Date date;
  date.day = static_cast<std::uint32_t>(day_of_year - (153 * month_from_march + 2) / 5 + 1);
  date.month =
      static_cast<std::uint32_t>(month_from_march < 10 ? month_from_march + 3 : month_from_march - 9);
  date.year = year_of_era + era * 400 + (date.month <= 2 ? 1 : 0);
  return date;
}

std::int64_t floor_mod(std::int64_t value, std::int64_t divisor) {
  const std::int64_t rest = value % divisor;
  return rest < 0 ? rest + divisor : rest;
}

bool is_time_register(std::uint8_t index) {
  return index == kSeconds || index == kMinutes || index == kHours || (index >= kWeekday && index <= kYear) ||
         index == kRtcCenturyIndex;
}

}  // namespace

Result<std::unique_ptr<Rtc>> Rtc::create(EventLoop& loop, const Clock& clock, std::unique_ptr<IrqLine> irq) {
  std::unique_ptr<Rtc> rtc(new Rtc(clock, std::move(irq)));
  WISP_ASSIGN(rtc->timer_, loop.timer(
                               [raw = rtc.get()] {
                                 raw->advance();
                                 raw->update_irq();
                               },
                               &rtc->mutex_));
  return rtc;
}

Rtc::Rtc(const Clock& clock, std::unique_ptr<IrqLine> irq) : clock_(clock), irq_(std::move(irq)) {
  state_.bytes[kControlA] = kADividerRunning | kARate1024;
  state_.bytes[kControlB] = kB24Hours;
  state_.bytes[kControlD] = kDValid;
  advanced_to_ = base_ns();
  show_time();
}

Rtc::~Rtc() {
  // With the lock, so that the timer's callback is not running afterwards.
  const std::lock_guard lock(mutex_);
  timer_ = Timer();
}

bool Rtc::running() const {
  return (state_.bytes[kControlB] & kBSet) == 0 &&
         (state_.bytes[kControlA] & kADividerMask) == kADividerRunning;
}

std::uint64_t Rtc::base_ns() const {
  return clock_.realtime_ns() + state_.phase_ns;
}

std::int64_t Rtc::guest_seconds(std::uint64_t base) const {
  return static_cast<std::int64_t>(base / kSecond) + state_.offset_seconds;
}

std::uint64_t Rtc::period_ns() const {
  std::uint32_t rate = state_.bytes[kControlA] & kARateMask;
  if (rate == 0) {
    return 0;
  }
  if (rate <= 2) {
    rate += 7;  // the two fastest settings repeat 256 Hz and 128 Hz
  }
  return (kSecond << (rate - 1)) / 32'768;
}

std::uint8_t Rtc::encode(std::uint32_t value) const {
  value %= 100;
  return static_cast<std::uint8_t>((state_.bytes[kControlB] & kBBinary) != 0 ? value
                                                                             : value / 10 * 16 + value % 10);
}

std::uint32_t Rtc::decode(std::uint8_t value) const {
  return (state_.bytes[kControlB] & kBBinary) != 0 ? value : (value >> 4) * 10U + (value & 0x0fU);
}

std::uint8_t Rtc::encode_hour(std::uint32_t hour) const {
  if ((state_.bytes[kControlB] & kB24Hours) != 0) {
    return encode(hour);
  }
  const std::uint32_t half_day = hour % 12 == 0 ? 12 : hour % 12;
  return static_cast<std::uint8_t>(encode(half_day) | (hour >= 12 ? kPm : 0));
}

std::uint32_t Rtc::decode_hour(std::uint8_t value) const {
  if ((state_.bytes[kControlB] & kB24Hours) != 0) {
    return decode(value);
  }
  const std::uint32_t half_day = decode(value & static_cast<std::uint8_t>(~kPm)) % 12;
  return half_day + ((value & kPm) != 0 ? 12 : 0);
}

void Rtc::show_time() {
  const std::int64_t now = guest_seconds(base_ns());
  const std::int64_t second_of_day = floor_mod(now, kDay);
  const std::int64_t days = (now - second_of_day) / kDay;
  const Date date = date_of(days);
  const auto year = static_cast<std::uint32_t>(floor_mod(date.year, 10'000));
  auto& bytes = state_.bytes;
  bytes[kSeconds] = encode(static_cast<std::uint32_t>(second_of_day % 60));
  bytes[kMinutes] = encode(static_cast<std::uint32_t>(second_of_day / 60 % 60));
  bytes[kHours] = encode_hour(static_cast<std::uint32_t>(second_of_day / 3600));
  bytes[kWeekday] = encode(static_cast<std::uint32_t>(floor_mod(days + 4, 7)) + 1);  // 1970-01-01: Thursday
  bytes[kDayOfMonth] = encode(date.day);
  bytes[kMonth] = encode(date.month);
  bytes[kYear] = encode(year % 100);
  bytes[kRtcCenturyIndex] = encode(year / 100);
}

void Rtc::take_time() {
  const auto& bytes = state_.bytes;
  // A field out of its range counts on into the next, but for the month; each is at most 255.
  const Date date{.year = decode(bytes[kRtcCenturyIndex]) * 100 + decode(bytes[kYear]),
                  .month = std::clamp(decode(bytes[kMonth]), 1U, 12U),
                  .day = decode(bytes[kDayOfMonth])};
  const std::int64_t seconds = days_of(date) * kDay + decode_hour(bytes[kHours]) * 3600 +
                               decode(bytes[kMinutes]) * 60 + decode(bytes[kSeconds]);
  state_.offset_seconds = seconds - static_cast<std::int64_t>(base_ns() / kSecond);
  advanced_to_ = base_ns();
}

void Rtc::write_time(std::uint8_t index, std::uint8_t value) {
  if (running()) {
    show_time();
    state_.bytes[index] = value;
    take_time();
  } else {
    state_.bytes[index] = value;
  }
}

std::uint64_t Rtc::seconds_to_alarm(std::int64_t from) const {
  struct Field {
    bool any = false;
    std::uint32_t value = 0;
    [[nodiscard]] bool matches(std::uint32_t now) const { return any || value == now; }
  };
  const auto field = [&](std::uint8_t index) {
    const std::uint8_t raw = state_.bytes[index];
    const bool any = (raw & kAlarmAny) == kAlarmAny;
    return Field{any, index == kHoursAlarm ? decode_hour(raw) : decode(raw)};
  };
  const Field hour = field(kHoursAlarm);
  const Field minute = field(kMinutesAlarm);
  const Field second = field(kSecondsAlarm);
  if ((!hour.any && hour.value > 23) || (!minute.any && minute.value > 59) ||
      (!second.any && second.value > 59)) {
    return 0;
  }
  // The first second after `from` that matches, field by field: at most a day, 25 hours, 61 minutes and 61
  // seconds looked at.
  const auto start = static_cast<std::uint32_t>(floor_mod(from + 1, kDay));
  for (std::uint32_t at = start; at < start + 2 * kDaySeconds;) {
    const std::uint32_t time = at % kDaySeconds;
    if (!hour.matches(time / 3600)) {
      at += 3600 - at % 3600;
    } else if (!minute.matches(time / 60 % 60)) {
      at += 60 - at % 60;
    } else if (!second.matches(time % 60)) {
      ++at;
    } else {
      return at - start + 1;
    }
  }
  return 0;
}

void Rtc::advance() {
  const std::uint64_t now = base_ns();
  const std::uint64_t before = std::exchange(advanced_to_, now);
  if (!running() || now <= before) {
    return;
  }
  std::uint8_t& flags = state_.bytes[kControlC];
  if (const std::uint64_t period = period_ns(); period != 0 && now / period != before / period) {
    flags |= kBPeriodic;
  }
  const std::int64_t seconds_before = guest_seconds(before);
  const std::int64_t seconds_now = guest_seconds(now);
  if (seconds_now != seconds_before) {
    flags |= kBUpdate;
    const std::uint64_t to_alarm = seconds_to_alarm(seconds_before);
    if (to_alarm != 0 && to_alarm <= static_cast<std::uint64_t>(seconds_now - seconds_before)) {
      flags |= kBAlarm;
    }
  }
}

void Rtc::update_irq() {
  std::uint8_t& flags = state_.bytes[kControlC];
  const bool wanted = (flags & state_.bytes[kControlB] & kBInterrupts) != 0;
  const bool raised = (flags & kCInterrupt) != 0;
  flags = static_cast<std::uint8_t>((flags & kBInterrupts) | (wanted ? kCInterrupt : 0));
  if (wanted && !raised) {
    irq_->pulse();
  }
  arm_timer();
}

void Rtc::arm_timer() {
  const std::uint8_t enabled = state_.bytes[kControlB] & kBInterrupts;
  // With an interrupt up there is no other edge before the guest has read register C.
  if (enabled == 0 || !running() || (state_.bytes[kControlC] & kCInterrupt) != 0) {
    timer_.disarm();
    return;
  }
  const std::uint64_t now = advanced_to_;
  const std::uint64_t to_second = kSecond - now % kSecond;
  std::uint64_t delay = kLongestTimer;
  if (const std::uint64_t period = period_ns(); (enabled & kBPeriodic) != 0 && period != 0) {
    delay = std::min(delay, period - now % period);
  }
  if ((enabled & kBUpdate) != 0) {
    delay = std::min(delay, to_second);
  }
  if ((enabled & kBAlarm) != 0) {
    if (const std::uint64_t to_alarm = seconds_to_alarm(guest_seconds(now)); to_alarm != 0) {
      delay = std::min(delay, to_second + (to_alarm - 1) * kSecond);
    }
  }
  timer_.arm(delay);
}

std::uint8_t Rtc::read_data() {
  const std::uint8_t index = state_.index;
  if (index == kControlA) {
    const bool updating = running() && base_ns() % kSecond >= kSecond - kUpdateNs;
    return static_cast<std::uint8_t>(state_.bytes[kControlA] | (updating ? kAUpdateInProgress : 0));
  }
  if (index == kControlC) {
    advance();
    update_irq();  // a flag that is seen here was an interrupt first
    const std::uint8_t flags = std::exchange(state_.bytes[kControlC], std::uint8_t{0});
    arm_timer();
    return flags;
  }
  if (is_time_register(index) && running()) {
    show_time();
  }
  return state_.bytes[index];
}

void Rtc::write_control_b(std::uint8_t value) {
  const bool was_running = running();
  if (was_running) {
    show_time();
  }
  if ((value & kBSet) != 0) {
    value &= static_cast<std::uint8_t>(~kBUpdate);
  }
  const std::uint8_t changed = state_.bytes[kControlB] ^ value;
  state_.bytes[kControlB] = value;
  if (!was_running && running()) {
    take_time();
  } else if (running() && (changed & (kBBinary | kB24Hours)) != 0) {
    show_time();
  }
}

void Rtc::write_data(std::uint8_t value) {
  const std::uint8_t index = state_.index;
  if (is_time_register(index)) {
    write_time(index, value);
    return;
  }
  switch (index) {
    case kControlA: {
      const bool was_running = running();
      if (was_running) {
        show_time();
      }
      state_.bytes[kControlA] = value & static_cast<std::uint8_t>(~kAUpdateInProgress);
      if (!was_running && running()) {
        // The divider starts from its reset: the first update comes half a second later.
        const std::uint64_t fraction = clock_.realtime_ns() % kSecond;
        state_.phase_ns = (kSecond + kSecond / 2 - fraction) % kSecond;
        take_time();
      }
      break;
    }
    case kControlB:
      write_control_b(value);
      break;
    case kControlC:
    case kControlD:
      break;  // read only
    default:
      state_.bytes[index] = value;  // alarms and memory
      break;
  }
}

void Rtc::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (std::uint8_t& byte : data) {
    // The index cannot be read back.
    byte = offset++ == 1 ? read_data() : std::uint8_t{0xff};
  }
}

void Rtc::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (const std::uint8_t byte : data) {
    if (offset++ == 0) {
      state_.index = byte & 0x7f;  // bit 7 masks the NMI
    } else {
      advance();
      write_data(byte);
      update_irq();
    }
  }
}

void Rtc::reset() {
  const std::lock_guard lock(mutex_);
  state_.index = 0;
  if (!running()) {
    // Caught in the middle of a setting: what was set is the time.
    state_.bytes[kControlA] = kADividerRunning | kARate1024;
    state_.bytes[kControlB] &= static_cast<std::uint8_t>(~kBSet);
    take_time();
  }
  state_.bytes[kControlB] &= static_cast<std::uint8_t>(~(kBInterrupts | kBSquareWave));
  state_.bytes[kControlC] = 0;
  advanced_to_ = base_ns();
  arm_timer();
}

StateRecord Rtc::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(state_.index);
  writer.put_bytes(state_.bytes);
  writer.put(state_.phase_ns);
  writer.put(state_.offset_seconds);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> Rtc::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  State state;
  WISP_ASSIGN(state.index, reader.get_at_most<std::uint8_t>(kBytes - 1, "CMOS index"));
  WISP_ASSIGN(const auto bytes, reader.get_bytes(kBytes));
  if (bytes.size() != kBytes) {
    return fail("saved state has {} bytes of CMOS memory, not {}", bytes.size(), kBytes);
  }
  std::ranges::copy(bytes, state.bytes.begin());
  WISP_ASSIGN(state.phase_ns, reader.get_at_most<std::uint64_t>(kSecond - 1, "CMOS clock phase"));
  WISP_ASSIGN(state.offset_seconds, reader.get<std::int64_t>());
  if (state.offset_seconds > kOffsetLimit || state.offset_seconds < -kOffsetLimit) {
    return fail("saved state has a clock {} seconds off", state.offset_seconds);
  }
  state.bytes[kControlA] &= static_cast<std::uint8_t>(~kAUpdateInProgress);
  state.bytes[kControlC] &= kBInterrupts | kCInterrupt;
  state.bytes[kControlD] = kDValid;
  const std::lock_guard lock(mutex_);
  state_ = state;
  advanced_to_ = base_ns();
  // An interrupt that was up is told again.
  const bool raised = (state_.bytes[kControlC] & kCInterrupt) != 0;
  update_irq();
  if (raised && (state_.bytes[kControlC] & kCInterrupt) != 0) {
    irq_->pulse();
  }
  return {};
}

}  // namespace wisp
