// The traditional memory balloon (virtio 1.2, section 5.5): inflate and deflate, statistics, free page
// reporting.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/property.h"
#include "virtio/device.h"

namespace wisp {

struct VirtioBalloonOptions {
  std::string id{};
  bool deflate_on_oom = false;
  bool free_page_reporting = false;
  std::uint64_t statistics_interval_s = 0;  // 0: only when refresh_statistics() is called
};

inline constexpr std::array<PropertySpec, 6> kVirtioBalloonProperties{{
    {.name = "deflate-on-oom",
     .kind = PropertyKind::kBool,
     .help = "the guest may take ballooned memory back before it kills processes",
     .default_text = "off"},
    {.name = "free-page-reporting",
     .kind = PropertyKind::kBool,
     .help = "the guest tells which pages are free, and the host takes them until they are touched",
     .default_text = "off"},
    {.name = "guest-stats-polling-interval",
     .kind = PropertyKind::kUint,
     .help = "seconds after which the guest is asked for its statistics again; with 0 each query-balloon "
             "asks for "
             "those that the next one tells",
     .default_text = "0",
     .maximum = 86400},
    {.name = "auto-balloon",
     .kind = PropertyKind::kBool,
     .help = "accepted for StratoVirt's sake",
     .default_text = "off",
     .ignored_because =
         "it needs a guest kernel with StratoVirt's own balloon messages; free-page-reporting=on "
         "gives free memory back with stock kernels"},
    {.name = "membuf-percent",
     .kind = PropertyKind::kUint,
     .help = "accepted for StratoVirt's sake, with auto-balloon",
     .default_text = "50",
     .minimum = 20,
     .maximum = 80,
     .ignored_because = "it belongs to auto-balloon"},
    {.name = "monitor-interval",
     .kind = PropertyKind::kUint,
     .help = "accepted for StratoVirt's sake, with auto-balloon",
     .default_text = "10",
     .minimum = 5,
     .maximum = 300,
     .ignored_because = "it belongs to auto-balloon"},
}};

[[nodiscard]] VirtioBalloonOptions virtio_balloon_options(const std::string& id,
                                                          const PropertySet& properties);

// What the balloon needs of its machine. Called with the device's strand lock held, on the event loop or on a
// vCPU thread: must not wait for either.
class BalloonHost {
 public:
  virtual ~BalloonHost() = default;
  // Gives whole pages of guest RAM back to the host; they read as zero from now on, or as a file that was
  // loaded there. The range was checked: it lies in one block of RAM.
  [[nodiscard]] virtual Result<void> discard(Gpa gpa, std::uint64_t size) = 0;
  // The guest told how much memory it has now, in bytes. At most once in kBalloonEventNs.
  virtual void balloon_changed(std::uint64_t actual) = 0;
};

inline constexpr std::uint64_t kBalloonEventNs = 1'000'000'000;

class VirtioBalloon final : public VirtioDevice {
 public:
  // `host` is borrowed and outlives the device.
  [[nodiscard]] static Result<std::unique_ptr<VirtioBalloon>> create(EventLoop& loop,
                                                                     const GuestMemory& memory,
                                                                     const VirtioBalloonOptions& options,
                                                                     BalloonHost& host, Log& log,
                                                                     const Clock& clock);

  // For QMP, with the strand's lock held.
  // Asks the guest to have `bytes` of memory: more than it was given counts as all of it; 0 is an error.
  [[nodiscard]] Result<void> set_target(std::uint64_t bytes);
  [[nodiscard]] std::uint64_t target() const;
  // What the guest says it has, in bytes.
  [[nodiscard]] std::uint64_t actual() const;
  // Asks the guest for new statistics, which statistics() tells once it gave them; nothing where it was asked
  // already.
  void refresh_statistics();
  // Asks for them at this interval; 0 ends it.
  void set_statistics_interval(std::uint64_t seconds);
  // The latest statistics, by QEMU's names ("stat-free-memory"); empty where the guest gave none.
  [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> statistics() const;

  [[nodiscard]] std::string_view name() const override { return "virtio-balloon"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 5; }
  [[nodiscard]] std::uint64_t features() const override;
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kQueueSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 protected:
  void on_pause() override;
  void on_resume() override;

 private:
  // Inflate, deflate, then up to three whose meaning depends on what was negotiated (see role()).
  static constexpr std::array<std::uint16_t, 5> kQueueSizes{128, 128, 128, 128, 128};
  static constexpr std::size_t kStatisticsCount = 10;
  enum class Role : std::uint8_t { kInflate, kDeflate, kStatistics, kReporting, kNone };
  struct Config {
    std::uint32_t num_pages = 0;  // what the host wants in the balloon
    std::uint32_t actual = 0;     // what the driver says is in it
  };

  VirtioBalloon(EventLoop& loop, const GuestMemory& memory, VirtioBalloonOptions options, BalloonHost& host,
                Log& log, const Clock& clock);
  [[nodiscard]] Role role(std::uint16_t queue) const;
  [[nodiscard]] std::uint64_t ram_pages() const;
  // Each returns the pages' worth of work it did.
  std::uint64_t inflate(const DescriptorChain& chain);
  std::uint64_t report(const DescriptorChain& chain);
  void take_statistics(std::uint16_t index);
  void parse_statistics(const DescriptorChain& chain);
  void ask_for_statistics();
  void give_back(Gpa gpa, std::uint64_t size);
  void tell_change();
  void serve(std::uint16_t index, Role role);

  const VirtioBalloonOptions options_;
  BalloonHost& host_;
  Log& log_;
  const Clock& clock_;
  LogGate gate_;
  Timer statistics_timer_;
  Timer event_timer_;
  std::optional<std::uint64_t> told_ns_;  // when balloon_changed was last called
  bool change_untold_ = false;
  Config config_;
  std::uint64_t statistics_interval_s_ = 0;
  std::array<std::optional<std::uint64_t>, kStatisticsCount> statistics_;
  std::optional<VirtioActivation> active_;
  DescriptorChain chain_;
  // The driver's statistics buffer, kept until new ones are wanted (5.5.6.3).
  DescriptorChain statistics_chain_;
  std::optional<std::uint16_t> statistics_queue_;  // where that chain is from, while it is kept
};

}  // namespace wisp
