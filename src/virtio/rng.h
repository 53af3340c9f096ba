// The entropy device (virtio 1.2, section 5.4).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/log.h"
#include "base/property.h"
#include "base/unique_fd.h"
#include "virtio/device.h"

namespace wisp {

struct VirtioRngOptions {
  std::string id{};
  std::string rng{};            // id of the rng-random object
  std::uint64_t max_bytes = 0;  // per period; 0: no limit
  std::uint64_t period_ms = 0;  // together with max_bytes
};

inline constexpr std::array<PropertySpec, 3> kVirtioRngProperties{{
    {.name = "rng",
     .help = "id of the -object rng-random that gives the bytes",
     .required = true,
     .maximum = 255},
    {.name = "max-bytes",
     .kind = PropertyKind::kUint,
     .help = "how many bytes the guest may take in each period",
     .default_text = "no limit",
     .minimum = 1,
     .maximum = 1'000'000'000},
    {.name = "period",
     .kind = PropertyKind::kUint,
     .help = "length of the period in milliseconds, with max-bytes",
     .default_text = "no limit",
     .minimum = 1,
     .maximum = 3'600'000},
}};

// Fails where only one of max-bytes and period is given.
[[nodiscard]] Result<VirtioRngOptions> virtio_rng_options(const std::string& id,
                                                          const PropertySet& properties);

// A file that gives random bytes (-object rng-random,filename=).
class FileEntropy final : public EntropySource {
 public:
  [[nodiscard]] static Result<std::unique_ptr<FileEntropy>> open(const std::string& path);
  // Never blocks: fails where the file has not that many bytes now, or no more at all.
  [[nodiscard]] Result<void> fill(std::span<std::uint8_t> buffer) override;

 private:
  FileEntropy(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  const std::string path_;
  const UniqueFd fd_;
};

class VirtioRng final : public VirtioDevice {
 public:
  [[nodiscard]] static Result<std::unique_ptr<VirtioRng>> create(EventLoop& loop, const GuestMemory& memory,
                                                                 const VirtioRngOptions& options,
                                                                 std::unique_ptr<EntropySource> source,
                                                                 Log& log, const Clock& clock);

  // A request gets at most this many bytes; the driver asks again for more.
  static constexpr std::size_t kMaxRequest = 4096;

  [[nodiscard]] std::string_view name() const override { return "virtio-rng"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 4; }
  [[nodiscard]] std::uint64_t features() const override { return 0; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kQueueSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t, std::span<const std::uint8_t>) override {}
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 protected:
  void on_pause() override;

 private:
  static constexpr std::array<std::uint16_t, 1> kQueueSizes{64};
  VirtioRng(EventLoop& loop, const GuestMemory& memory, VirtioRngOptions options,
            std::unique_ptr<EntropySource> source, Log& log, const Clock& clock);
  void serve();
  // How many bytes may be given now; where none, the timer is set for when some may.
  [[nodiscard]] std::uint64_t allowance();

  const VirtioRngOptions options_;
  const std::unique_ptr<EntropySource> source_;
  Log& log_;
  const Clock& clock_;
  LogGate gate_;
  Timer timer_;
  std::optional<VirtioActivation> active_;
  DescriptorChain chain_;
  std::uint64_t period_start_ns_ = 0;
  std::uint64_t taken_in_period_ = 0;
};

}  // namespace wisp
