// A machine on the fake engine with a small kernel, and what its listeners heard.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "machine/machine.h"
#include "support/fake_engine.h"

namespace wisp::test {

// A directory of its own, gone with its files at the end.
class TempDir final {
 public:
  TempDir() {
    std::string name = std::filesystem::temp_directory_path() / "wisp-machine-XXXXXX";
    if (::mkdtemp(name.data()) != nullptr) {
      path_ = name;
    }
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::string file(const std::string& name) const { return path_ / name; }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(file(name), std::ios::binary) << bytes;
    return file(name);
  }
  std::string image(const std::string& name, std::uint64_t size) const {
    std::ofstream(file(name), std::ios::binary).close();
    std::filesystem::resize_file(file(name), size);
    return file(name);
  }
  [[nodiscard]] std::size_t entries() const {
    std::size_t count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path_)) {
      ++count;
    }
    return count;
  }

 private:
  std::filesystem::path path_;
};

// What this process has open, by what it is: "socket", "anon_inode:[eventfd]", a path.
inline std::vector<std::string> open_files() {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    std::string target = std::filesystem::read_symlink(entry.path(), error);
    if (error || target.starts_with("/proc/")) {
      continue;  // the listing's own
    }
    if (target.starts_with("socket:") || target.starts_with("pipe:")) {
      target.resize(target.find(':'));
    }
    files.push_back(std::move(target));
  }
  std::ranges::sort(files);
  return files;
}

// For as long as it lives, standard input and output are another file.
class StandardFiles final {
 public:
  StandardFiles(int input, int output) {
    (void)std::fflush(stdout);
    EXPECT_EQ(::dup2(input, STDIN_FILENO), STDIN_FILENO);
    EXPECT_EQ(::dup2(output, STDOUT_FILENO), STDOUT_FILENO);
  }
  StandardFiles(const StandardFiles&) = delete;
  StandardFiles& operator=(const StandardFiles&) = delete;
  ~StandardFiles() {
    ::dup2(input_.get(), STDIN_FILENO);
    ::dup2(output_.get(), STDOUT_FILENO);
  }

 private:
  const UniqueFd input_{::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3)};
  const UniqueFd output_{::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3)};
};

inline PropertySet properties(std::initializer_list<std::pair<const char*, PropertyValue>> values) {
  PropertySet set;
  for (const auto& [name, value] : values) {
    set.set(name, value);
  }
  return set;
}

class EventRecord final : public MachineEvents {
 public:
  void on_shutdown(bool by_guest, ShutdownReason reason) override {
    note(fmt::format("shutdown {} {}", by_guest ? "guest" : "host", static_cast<int>(reason)));
  }
  void on_reset(bool by_guest) override { note(by_guest ? "reset guest" : "reset host"); }
  void on_stop() override { note("stop"); }
  void on_resume() override { note("resume"); }
  void on_powerdown() override { note("powerdown"); }
  void on_balloon_change(std::uint64_t actual) override { note(fmt::format("balloon {}", actual)); }
  void on_device_deleted(const std::string& id, const std::string& path) override {
    note(fmt::format("deleted {} {}", id, path));
  }
  [[nodiscard]] const std::vector<std::string>& all() const { return all_; }
  // What was heard since the last call.
  std::vector<std::string> take() { return std::exchange(all_, {}); }
  std::function<void(const std::string&)> then;

 private:
  void note(const std::string& text) {
    all_.push_back(text);
    if (then) {
      then(text);
    }
  }
  std::vector<std::string> all_;
};

inline constexpr std::uint64_t kMiB = 1ULL << 20;

class MachineKit : public ::testing::Test {
 protected:
  using Strings = std::vector<std::string>;
  static constexpr int kByGuestShutdown = static_cast<int>(ShutdownReason::kGuestShutdown);

  MachineKit() {
    // No magic number of any format: a flat image, entered at 16 MiB.
    kernel_.assign(600, '\x90');
    kernel_[1] = '\0';  // and no text
    kernel_.replace(kernel_.size() - 4, 4, "last");
    config_.boot.kernel = dir_.write("kernel", kernel_);
    config_.boot.cmdline = "console=ttyS0";
    config_.memory.size = 64 * kMiB;
    const int log = ::open(dir_.file("log").c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_APPEND, 0600);
    log_fd_ = UniqueFd(log);
    log_.set_fd(log);
  }
  ~MachineKit() override {
    machine_.reset();
    run_posted();
  }

  Result<void> try_create() {
    auto engine = std::make_unique<FakeHypervisor>();
    hypervisor_ = engine.get();
    auto made = Machine::create(config_, std::move(engine),
                                {.loop = *loop_,
                                 .log = log_,
                                 .clock = clock_,
                                 .entropy = entropy_,
                                 .seccomp = seccomp_,
                                 .judge_engine = {}});
    if (!made) {
      return std::unexpected(made.error());
    }
    machine_ = *std::move(made);
    machine_->add_events(&events_);
    return {};
  }
  void create() {
    const auto made = try_create();
    ASSERT_TRUE(made) << made.error().message;
  }
  void create_and_start() {
    ASSERT_NO_FATAL_FAILURE(create());
    const auto started = machine_->start();
    ASSERT_TRUE(started) << started.error().message;
  }

  FakeVm& vm() { return *hypervisor_->vm(); }
  FakeVcpu& vcpu(std::uint32_t id = 0) { return *vm().vcpu(id); }
  Machine& machine() { return *machine_; }

  void run_posted() {
    for (int i = 0; i < 4; ++i) {
      loop_->run_once(0);
    }
  }
  // Runs the main loop until then; false after a long time.
  [[nodiscard]] bool run_until(const std::function<bool()>& done) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (!done()) {
      if (std::chrono::steady_clock::now() > deadline) {
        return false;
      }
      loop_->run_once(10);
    }
    return true;
  }
  [[nodiscard]] bool run_until_events(std::size_t count) {
    return run_until([&] { return events_.all().size() >= count; });
  }

  // As the guest's processor would, through the machine's own spaces.
  std::uint32_t guest_port_read(std::uint16_t port) {
    vcpu().script(FakeExit::port_read(port, 4));
    EXPECT_TRUE(vcpu().wait_until_idle());
    return load_le<std::uint32_t>(vcpu().answers().back().data());
  }
  void guest_port_write(std::uint16_t port, std::uint32_t value, std::size_t size = 4) {
    std::vector<std::uint8_t> data(size);
    u64_to_bytes(value, data);
    vcpu().script(FakeExit::port_write(port, data));
    EXPECT_TRUE(vcpu().wait_until_idle());
  }
  std::uint32_t guest_read(Gpa address) {
    vcpu().script(FakeExit::mmio_read(address, 4));
    EXPECT_TRUE(vcpu().wait_until_idle());
    return load_le<std::uint32_t>(vcpu().answers().back().data());
  }
  // Guest RAM as the engine was told of it.
  std::uint8_t* host(Gpa address) {
    const auto ranges = vm().memory_listener().ranges();
    for (const auto& [start, range] : ranges) {
      if (address >= start && address - start < range.size) {
        return range.host + (address - start);
      }
    }
    return nullptr;
  }
  [[nodiscard]] std::string logged() const {
    std::ifstream file(dir_.file("log"));
    return {std::istreambuf_iterator<char>(file), {}};
  }

  BackendConfig drive(const std::string& id, std::uint64_t size = kMiB) {
    return {
        .kind = "", .id = id, .properties = properties({{"file", dir_.image(id + ".img", size)}}), .fds = {}};
  }
  static DeviceConfig blk(const std::string& id, const std::string& drive) {
    return {.driver = "virtio-blk-device", .id = id, .properties = properties({{"drive", drive}})};
  }
  static DeviceConfig balloon(const std::string& id) {
    return {.driver = "virtio-balloon-device", .id = id, .properties = {}};
  }

  TempDir dir_;
  std::string kernel_;
  UniqueFd log_fd_;
  Log log_{-1};
  SystemClock clock_;
  SystemEntropy entropy_;
  std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  EventRecord events_;
  MachineConfig config_;
  bool seccomp_ = false;
  FakeHypervisor* hypervisor_ = nullptr;
  std::unique_ptr<Machine> machine_;
};

}  // namespace wisp::test
