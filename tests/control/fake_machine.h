// A machine that keeps what control asks of it, for tests without an engine.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "machine/machine_control.h"

namespace wisp::test {

class FakeMachine final : public MachineControl {
 public:
  FakeMachine() {
    config_.name = "web-1";
    config_.memory.size = 256ULL << 20;
    config_.cpus.count = 2;
    blocks_.push_back({.drive_id = "rootfs",
                       .device_id = "blk0",
                       .file = "/srv/rootfs.img",
                       .format = "raw",
                       .read_only = false,
                       .direct = true,
                       .size = 1ULL << 30,
                       .limits = {.iops = 500, .iops_burst = 50, .bps = 1 << 20},
                       .counters = {.reads = {.done = 2, .bytes = 4096},
                                    .writes = {.done = 1, .failed = 3, .bytes = 512},
                                    .highest_written = 9728}});
    devices.push_back("blk0");
  }

  void add_events(MachineEvents* events) override { listeners_.push_back(events); }
  void remove_events(MachineEvents* events) override { std::erase(listeners_, events); }
  template <typename Tell>
  void tell(const Tell& tell_one) {
    for (MachineEvents* listener : std::vector(listeners_)) {
      tell_one(*listener);
    }
  }

  [[nodiscard]] const MachineConfig& config() const override { return config_; }
  [[nodiscard]] RunState state() const override { return state_; }
  [[nodiscard]] std::string engine_name() const override { return "kvm"; }
  [[nodiscard]] Result<void> pause() override {
    if (state_ == RunState::kPaused) {
      return {};
    }
    if (state_ == RunState::kCreated) {
      return {};  // it will start paused
    }
    if (state_ != RunState::kRunning) {
      return fail("the machine does not run");
    }
    state_ = RunState::kPaused;
    tell([](MachineEvents& events) { events.on_stop(); });
    return {};
  }
  [[nodiscard]] Result<void> resume() override {
    if (state_ == RunState::kRunning) {
      return {};
    }
    if (state_ == RunState::kShutdown) {
      return fail("the machine was shut down");
    }
    state_ = RunState::kRunning;
    tell([](MachineEvents& events) { events.on_resume(); });
    return {};
  }
  [[nodiscard]] Result<void> powerdown() override {
    tell([](MachineEvents& events) { events.on_powerdown(); });
    return {};
  }
  [[nodiscard]] Result<void> reset() override {
    tell([](MachineEvents& events) { events.on_reset(false); });
    return {};
  }
  void quit(ShutdownReason reason) override {
    state_ = RunState::kShutdown;
    ++quits;
    tell([&](MachineEvents& events) { events.on_shutdown(false, reason); });
  }

  [[nodiscard]] std::vector<VcpuInfo> vcpus() const override {
    std::vector<VcpuInfo> list;
    for (std::uint32_t i = 0; i < config_.cpus.count; ++i) {
      list.push_back({.index = i, .thread_id = 1000 + i, .topology = {}, .core_id = i});
    }
    return list;
  }
  [[nodiscard]] std::vector<BlockInfo> blocks() const override { return blocks_; }
  [[nodiscard]] std::vector<ChardevInfo> chardevs() const override { return chardevs_; }
  [[nodiscard]] std::vector<IothreadInfo> iothreads() const override {
    return {{.id = "io0", .thread_id = 77}};
  }
  [[nodiscard]] Result<BalloonInfo> balloon() const override {
    if (!has_balloon) {
      return fail("No balloon device has been activated");
    }
    return BalloonInfo{.actual = balloon_, .statistics = {{"stat-free-memory", 1024}}};
  }
  [[nodiscard]] Result<void> set_balloon(std::uint64_t bytes) override {
    if (!has_balloon) {
      return fail("No balloon device has been activated");
    }
    balloon_ = bytes;
    tell([&](MachineEvents& events) { events.on_balloon_change(bytes); });
    return {};
  }

  [[nodiscard]] Result<void> add_drive(const BackendConfig& drive) override {
    for (const BlockInfo& block : blocks_) {
      if (block.drive_id == drive.id) {
        return fail("drive '{}' is there already", drive.id);
      }
    }
    drives.push_back(drive);
    blocks_.push_back({.drive_id = drive.id,
                       .device_id = {},
                       .file = drive.properties.get_string("file"),
                       .format = "raw",
                       .read_only = drive.properties.get_bool("readonly", false)});
    return {};
  }
  [[nodiscard]] Result<void> remove_drive(const std::string& id) override {
    if (std::erase_if(blocks_, [&](const BlockInfo& block) { return block.drive_id == id; }) == 0) {
      return fail("drive '{}' is not there", id);
    }
    return {};
  }
  [[nodiscard]] Result<void> add_netdev(const BackendConfig& netdev) override {
    for (const int fd : netdev.fds) {
      taken_fds.emplace_back(fd);
    }
    if (netdev.id == "bad") {
      taken_fds.clear();
      return fail("netdev bad: no such interface");
    }
    netdevs.push_back(netdev);
    return {};
  }
  [[nodiscard]] Result<void> remove_netdev(const std::string& id) override {
    if (std::erase_if(netdevs, [&](const BackendConfig& netdev) { return netdev.id == id; }) == 0) {
      return fail("netdev '{}' is not there", id);
    }
    return {};
  }
  [[nodiscard]] Result<void> add_chardev(const BackendConfig& chardev) override {
    added_chardevs.push_back(chardev);
    chardevs_.push_back({.id = chardev.id,
                         .description = chardev.kind == "pty"
                                            ? "pty:/dev/pts/9"
                                            : chardev.kind + ":" + chardev.properties.get_string("path"),
                         .connected = false});
    return {};
  }
  [[nodiscard]] Result<void> remove_chardev(const std::string& id) override {
    if (std::erase_if(chardevs_, [&](const ChardevInfo& chardev) { return chardev.id == id; }) == 0) {
      return fail("chardev '{}' is not there", id);
    }
    return {};
  }
  [[nodiscard]] Result<std::string> read_ring(const std::string& id, std::size_t most) override {
    if (id != "log0") {
      return fail("there is no chardev with id '{}'", id);
    }
    const std::string taken = ring.substr(0, most);
    ring.erase(0, taken.size());
    return taken;
  }
  [[nodiscard]] Result<void> write_ring(const std::string& id, std::string_view bytes) override {
    if (id != "log0") {
      return fail("there is no chardev with id '{}'", id);
    }
    ring += bytes;
    return {};
  }
  [[nodiscard]] Result<void> add_device(const DeviceConfig& device) override {
    devices.push_back(device.id);
    added_devices.push_back(device);
    return {};
  }
  [[nodiscard]] Result<void> remove_device(const std::string& id) override {
    if (std::erase(devices, id) == 0) {
      return fail("device '{}' is not there", id);
    }
    tell([&](MachineEvents& events) { events.on_device_deleted(id, "/machine/peripheral/" + id); });
    return {};
  }

  bool has_balloon = true;
  int quits = 0;
  std::vector<BackendConfig> drives, netdevs, added_chardevs;
  std::vector<DeviceConfig> added_devices;
  std::vector<std::string> devices;
  std::vector<UniqueFd> taken_fds;
  std::string ring;  // of the chardev log0

  void set_state(RunState state) { state_ = state; }

 private:
  MachineConfig config_;
  RunState state_ = RunState::kRunning;
  std::vector<MachineEvents*> listeners_;
  std::vector<BlockInfo> blocks_;
  std::vector<ChardevInfo> chardevs_{{.id = "serial0", .description = "stdio", .connected = true}};
  std::uint64_t balloon_ = 256ULL << 20;
};

}  // namespace wisp::test
