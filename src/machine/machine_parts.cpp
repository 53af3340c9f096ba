// What control asks about a machine's parts, and hotplug.
#include <algorithm>
#include <latch>
#include <memory>

#include "base/lent_fds.h"
#include "machine/machine.h"

namespace wisp {

std::vector<VcpuInfo> Machine::vcpus() const {
  std::vector<VcpuInfo> result;
  const CpuTopology& topology = config_.cpus.topology;
  for (std::uint32_t i = 0; i < vcpus_.size(); ++i) {
    std::uint32_t rest = i;
    VcpuInfo info{.index = i, .thread_id = vcpus_[i]->thread_id(), .topology = topology};
    info.thread_in_core = rest % topology.threads;
    rest /= topology.threads;
    info.core_id = rest % topology.cores;
    rest /= topology.cores;
    info.cluster_id = rest % topology.clusters;
    rest /= topology.clusters;
    info.die_id = rest % topology.dies;
    info.socket_id = rest / topology.dies;
    result.push_back(info);
  }
  return result;
}

std::vector<BlockInfo> Machine::blocks() const {
  std::vector<BlockInfo> result;
  for (const auto& [id, drive] : backends_->drives()) {
    const BlockIdentity& identity = drive.backend->identity();
    result.push_back({.drive_id = id,
                      .device_id = drive.user,
                      .file = identity.file,
                      .format = identity.format,
                      .read_only = drive.backend->geometry().read_only,
                      .direct = identity.direct,
                      .size = drive.backend->geometry().size,
                      .limits = drive.limits,
                      .counters = factory_->block_counters(drive.user)});
  }
  return result;
}

std::vector<ChardevInfo> Machine::chardevs() const {
  std::vector<ChardevInfo> result;
  for (const auto& [id, chardev] : backends_->chardevs()) {
    if (chardev.backend == nullptr) {
      continue;
    }
    result.push_back({.id = id,
                      .description = chardev.backend->description(),
                      .connected = chardev.backend->is_connected()});
  }
  return result;
}

std::vector<IothreadInfo> Machine::iothreads() const {
  std::vector<IothreadInfo> result;
  for (const auto& io : iothreads_) {
    result.push_back({.id = io->id(), .thread_id = io->thread_id()});
  }
  return result;
}

Result<BalloonInfo> Machine::balloon() const {
  return factory_->balloon_info();
}
Result<void> Machine::set_balloon(std::uint64_t bytes) {
  return factory_->set_balloon(bytes);
}

Result<void> Machine::add_drive(const BackendConfig& drive) {
  return backends_->add_drive(drive);
}
Result<void> Machine::remove_drive(const std::string& id) {
  return backends_->remove_drive(id);
}
Result<void> Machine::add_netdev(const BackendConfig& netdev) {
  return backends_->add_netdev(netdev);
}
Result<void> Machine::remove_netdev(const std::string& id) {
  return backends_->remove_netdev(id);
}
Result<void> Machine::add_chardev(const BackendConfig& chardev) {
  return backends_->add_chardev(chardev);
}
Result<void> Machine::remove_chardev(const std::string& id) {
  return backends_->remove_chardev(id);
}

Result<std::string> Machine::read_ring(const std::string& id, std::size_t most) {
  WISP_ASSIGN(RingBackend * ring, backends_->ring(id));
  return ring->take(most);
}
Result<void> Machine::write_ring(const std::string& id, std::string_view bytes) {
  WISP_ASSIGN(RingBackend * ring, backends_->ring(id));
  ring->write(std::span(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()));
  return {};
}

Result<void> Machine::add_device(const DeviceConfig& device) {
  LentFds lent(device.properties);
  const auto is_part = [&device](const DeviceConfig& other) {
    return other.id == device.id && !DeviceFactory::is_virtio(other);
  };
  if (slots_->find(device.id) || std::ranges::any_of(config_.devices, is_part)) {
    return fail("device id '{}' is taken", device.id);
  }
  if (!DeviceFactory::is_virtio(device)) {
    return fail("{} cannot be added to a running machine", device.driver);
  }
  lent.release();
  WISP_TRY(attach_device(device, true));
  if (state_ == RunState::kPaused) {
    slots_->find(device.id)->transport->pause();
  }
  return {};
}

void Machine::destroy_beside(EventLoop& loop, std::shared_ptr<void> part) {
  if (&loop == &services_.loop) {
    return;
  }
  struct Meeting {
    std::latch stopped{1};
    std::latch gone{1};
  };
  const auto meeting = std::make_shared<Meeting>();
  loop.post([meeting] {
    meeting->stopped.count_down();
    meeting->gone.wait();
  });
  meeting->stopped.wait();
  part.reset();
  meeting->gone.count_down();
}

Result<void> Machine::remove_device(const std::string& id) {
  if (!slots_->find(id)) {
    return fail("there is no device with id '{}'", id);
  }
  // No vCPU may be inside the device's registers when it goes.
  park_vcpus();
  Result<void> removed;
  if (auto detached = slots_->detach(id); detached) {
    factory_->forget(id);
    EventLoop& loop = (*detached)->device().strand().loop();
    destroy_beside(loop, *std::move(detached));
  } else {
    removed = std::unexpected(std::move(detached).error());
  }
  if (state_ == RunState::kRunning) {
    resume_vcpus();
  }
  WISP_TRY(removed);
  backends_->release(id);
  platform_->slot_hotplug().set_present(slots_->present());
  services_.loop.post([this, id, alive = alive_] {
    if (*alive) {
      tell(&MachineEvents::on_device_deleted, id, "/machine/peripheral/" + id);
    }
  });
  return {};
}

}  // namespace wisp
