#include "machine/backends.h"

#include "base/lent_fds.h"
#include "block/drive.h"
#include "chardev/char_options.h"
#include "virtio/rng.h"

namespace wisp {
namespace {

constexpr const char* kKernelRandom = "/dev/urandom";

template <typename Map>
Result<void> check_new(const Map& map, const char* option, const std::string& id) {
  if (map.contains(id)) {
    return fail("{} {}: this id is taken", option, id);
  }
  return {};
}

template <typename Map>
auto find_entry(Map& map, const char* option, const std::string& id) -> Result<typename Map::mapped_type*> {
  const auto found = map.find(id);
  if (found == map.end()) {
    return fail("there is no {} with id '{}'", option, id);
  }
  return &found->second;
}

template <typename Map>
Result<void> remove_unused(Map& map, const char* option, const std::string& id) {
  WISP_ASSIGN(const auto* entry, find_entry(map, option, id));
  if (!entry->user.empty()) {
    return fail("{} {} is in use by device '{}': remove the device first", option, id, entry->user);
  }
  map.erase(id);
  return {};
}

template <typename Entry>
Result<void> claim(Entry& entry, const char* option, const std::string& id, const std::string& user) {
  if (!entry.user.empty()) {
    return fail("{} {} is already in use by device '{}'", option, id, entry.user);
  }
  entry.user = user;
  return {};
}

}  // namespace

Result<void> Backends::add_drive(const BackendConfig& config) {
  WISP_TRY(check_new(drives_, "drive", config.id));
  WISP_ASSIGN(const DriveConfig drive, drive_config(config.id, config.properties));
  WISP_ASSIGN(auto backend, open_drive(drive, log_, clock_, worker_started_));
  drives_.emplace(
      config.id,
      DriveEntry{.config = config, .backend = std::move(backend), .limits = drive.limits, .user = {}});
  return {};
}

Result<Netdev> Backends::open(const NetdevConfig& config) const {
  if (config.kind == NetdevKind::kPasst && held_to_filter_) {
    return fail(
        "netdev {}: passt cannot be started once the machine runs, since the system-call filter lets no "
        "program be started; give -netdev user on the command line, or start passt --socket PATH yourself "
        "and use type stream with path PATH",
        config.id);
  }
  return open_netdev(config);
}

Result<void> Backends::add_netdev(const BackendConfig& config) {
  LentFds lent(config.properties, config.fds);
  WISP_TRY(check_new(netdevs_, "netdev", config.id));
  WISP_ASSIGN(const NetdevConfig parsed, parse_netdev(config.kind, config.id, config.properties, config.fds));
  lent.release();
  WISP_ASSIGN(Netdev netdev, open(parsed));
  netdevs_.emplace(config.id, NetdevEntry{.config = config, .netdev = std::move(netdev), .user = {}});
  return {};
}

Result<void> Backends::add_chardev(const BackendConfig& config) {
  WISP_TRY(check_new(chardevs_, "chardev", config.id));
  WISP_ASSIGN(CharConfig parsed, char_config(config.kind, config.id, config.properties));
  parsed.on_quit = on_quit_;
  if (held_to_filter_ && parsed.kind == CharKind::kSocket && parsed.path.empty() && parsed.fd < 0) {
    return fail(
        "chardev {}: a TCP socket cannot be opened once the machine runs, since the system-call filter lets "
        "only Unix sockets be; give -chardev socket,port=... on the command line, or use a Unix socket "
        "(path) "
        "and let socat lead there",
        config.id);
  }
  WISP_ASSIGN(auto backend, create_char_backend(parsed, loop_, log_));
  chardevs_.emplace(config.id, ChardevEntry{.backend = std::move(backend), .path = {}, .user = {}});
  return {};
}

Result<void> Backends::add_chardev_path(const BackendConfig& config) {
  WISP_TRY(check_new(chardevs_, "chardev", config.id));
  std::string path = config.properties.get_string("path");
  if (config.kind != "socket" || path.empty()) {
    return fail("chardev {}: a vhost-user device needs a socket with path=", config.id);
  }
  chardevs_.emplace(config.id, ChardevEntry{.backend = nullptr, .path = std::move(path), .user = {}});
  return {};
}

void Backends::refresh_terminal_sizes() {
  for (const auto& [id, chardev] : chardevs_) {
    if (chardev.backend != nullptr) {
      chardev.backend->refresh_size();
    }
  }
}

Result<void> Backends::remove_drive(const std::string& id) {
  return remove_unused(drives_, "drive", id);
}
Result<void> Backends::remove_netdev(const std::string& id) {
  return remove_unused(netdevs_, "netdev", id);
}
Result<void> Backends::remove_chardev(const std::string& id) {
  return remove_unused(chardevs_, "chardev", id);
}

Result<BlockBackend*> Backends::use_drive(const std::string& id, const std::string& user) {
  WISP_ASSIGN(DriveEntry * entry, find_entry(drives_, "drive", id));
  WISP_TRY(claim(*entry, "drive", id, user));
  return entry->backend.get();
}

Result<Netdev> Backends::take_netdev(const std::string& id, const std::string& user) {
  WISP_ASSIGN(NetdevEntry * entry, find_entry(netdevs_, "netdev", id));
  if (!entry->netdev && entry->user.empty()) {
    // A device had it and is gone, and its back end went with it: open it again.
    WISP_ASSIGN(const NetdevConfig parsed,
                parse_netdev(entry->config.kind, id, entry->config.properties, entry->config.fds));
    if (!parsed.fds.empty() || !parsed.vhost_fds.empty()) {
      // Their numbers may mean other files by now.
      return fail(
          "netdev {}: the descriptors it was given were closed with the device that had it; remove it and "
          "add "
          "it again",
          id);
    }
    WISP_ASSIGN(entry->netdev, open(parsed));
  }
  WISP_TRY(claim(*entry, "netdev", id, user));
  Netdev netdev = *std::move(entry->netdev);
  entry->netdev.reset();
  return netdev;
}

Result<CharBackend*> Backends::use_chardev(const std::string& id, const std::string& user) {
  WISP_ASSIGN(ChardevEntry * entry, find_entry(chardevs_, "chardev", id));
  if (entry->backend == nullptr) {
    return fail("chardev {} belongs to a vhost-user device", id);
  }
  WISP_TRY(claim(*entry, "chardev", id, user));
  return entry->backend.get();
}

Result<std::string> Backends::use_chardev_path(const std::string& id, const std::string& user) {
  WISP_ASSIGN(ChardevEntry * entry, find_entry(chardevs_, "chardev", id));
  if (entry->path.empty()) {
    return fail("chardev {} is in use for something else than a vhost-user device", id);
  }
  WISP_TRY(claim(*entry, "chardev", id, user));
  return entry->path;
}

Result<void> Backends::add_object(const BackendConfig& config) {
  WISP_TRY(check_new(rng_files_, "object", config.id));
  rng_files_.emplace(config.id, config.properties.get_string("filename", kKernelRandom));
  return {};
}

Result<RingBackend*> Backends::ring(const std::string& id) {
  WISP_ASSIGN(const auto* entry, find_entry(chardevs_, "chardev", id));
  auto* ring = dynamic_cast<RingBackend*>(entry->backend.get());
  if (ring == nullptr) {
    return fail("chardev {} is not of kind ringbuf", id);
  }
  return ring;
}

Result<std::unique_ptr<EntropySource>> Backends::open_rng(const std::string& id) const {
  const auto found = rng_files_.find(id);
  if (found == rng_files_.end()) {
    return fail("there is no object rng-random with id '{}'", id);
  }
  if (found->second == kKernelRandom || found->second == "/dev/random") {
    // The same bytes without a file.
    return std::make_unique<SystemEntropy>();
  }
  WISP_ASSIGN(auto file, FileEntropy::open(found->second));
  return std::unique_ptr<EntropySource>(std::move(file));
}

void Backends::release(const std::string& user) {
  const auto release_in = [&user](auto& map) {
    for (auto& [id, entry] : map) {
      if (entry.user == user) {
        entry.user.clear();
      }
    }
  };
  release_in(drives_);
  release_in(netdevs_);
  release_in(chardevs_);
}

}  // namespace wisp
