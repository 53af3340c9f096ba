// Block requests per second through a virtqueue: a fake driver, the device, the back end and a file in the
// host's page cache; 4 KiB random reads. No vCPU, no exit: the cost of the device and the host alone.
//
//   bench_block_queue [DIRECTORY]    where the 64 MiB file is put; default /dev/shm
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "block/drive.h"
#include "virtio/blk_kit.h"

namespace wisp {
namespace {

using test::BlkDriver;
using test::ChainBuilder;
using test::FakeGuest;

constexpr std::uint64_t kDisk = 64UL << 20;
constexpr std::uint32_t kBlock = 4096;
constexpr int kRuns = 7;
constexpr std::uint64_t kRunNs = 300'000'000;

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Figures {
  double per_second;
  double cpu_us;  // of all threads, per request
};

Figures measure(BlkDriver& driver, std::uint32_t depth) {
  FakeGuest& guest = driver.harness.guest();
  guest.clear();
  if (!driver.harness.activate({.event_idx = true, .queue_size = 256})) {
    std::abort();
  }
  test::FakeQueue& queue = driver.harness.queue(0);
  std::mt19937_64 random(1);
  std::vector<Gpa> headers(256);
  for (std::uint32_t i = 0; i < depth; ++i) {
    const Gpa header = driver.header(test::kBlkIn, random() % (kDisk / kBlock) * (kBlock / 512));
    const std::uint16_t head = queue.add(ChainBuilder()
                                             .readable(header, 16)
                                             .writable(guest.allocate(kBlock, kBlock), kBlock)
                                             .writable(driver.status(), 1));
    headers.at(head) = header;
  }
  std::uint64_t done = 0;
  const double cpu = cpu_seconds();
  const std::uint64_t start = driver.clock.monotonic_ns();
  std::uint64_t now = start;
  while (now - start < kRunNs) {
    if (queue.take_notify_wish()) {
      driver.harness.notify(0);
    }
    if (queue.used_index() == static_cast<std::uint16_t>(done)) {
      // As the transport's loop does: completions, and kicks that the device gives itself.
      if (!driver.harness.pump_until(
              [&] { return queue.used_index() != static_cast<std::uint16_t>(done); })) {
        std::fputs("a request was lost\n", stderr);
        std::abort();
      }
    }
    while (const auto used = queue.take_used()) {
      ++done;
      guest.store<std::uint64_t>(headers.at(used->head) + 8, random() % (kDisk / kBlock) * (kBlock / 512));
      queue.publish(static_cast<std::uint16_t>(used->head));
      queue.set_interrupts(true);
    }
    now = driver.clock.monotonic_ns();
  }
  const double used_cpu = cpu_seconds() - cpu;
  driver.harness.reset();
  const auto requests = static_cast<double>(done);
  return {requests / (static_cast<double>(now - start) / 1e9), used_cpu / requests * 1e6};
}

int run(const std::string& directory) {
  const std::string file = directory + "/wisp-bench-" + std::to_string(::getpid());
  {
    const UniqueFd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    const std::vector<char> chunk(1UL << 20, 'x');
    for (std::uint64_t at = 0; at < kDisk; at += chunk.size()) {
      if (::pwrite(fd.get(), chunk.data(), chunk.size(), static_cast<off_t>(at)) < 0) {
        std::perror(file.c_str());
        return 1;
      }
    }
  }
  std::printf("4 KiB random reads from %s (page cache), median of %d runs\n", directory.c_str(), kRuns);
  std::printf("%-10s %6s %12s %14s\n", "aio", "depth", "requests/s", "CPU us/request");
  for (const auto& [aio, name] : {std::pair{AioKind::kIoUring, "io_uring"},
                                  std::pair{AioKind::kThreads, "threads"}, std::pair{AioKind::kOff, "off"}}) {
    Log log;
    const SystemClock clock;
    auto drive = open_drive({.id = "d", .file = file, .direct = false, .aio = aio}, log, clock);
    if (!drive) {
      std::fprintf(stderr, "%s\n", drive.error().message.c_str());
      return 1;
    }
    BlkDriver driver(**drive, {.id = "b", .drive = "d"});
    for (const std::uint32_t depth : {1U, 8U, 64U}) {
      std::vector<Figures> runs;
      for (int i = 0; i < kRuns; ++i) {
        runs.push_back(measure(driver, depth));
      }
      std::ranges::sort(runs, {}, &Figures::per_second);
      const Figures& median = runs[kRuns / 2];
      std::printf("%-10s %6u %12.0f %14.2f\n", name, depth, median.per_second, median.cpu_us);
    }
  }
  ::unlink(file.c_str());
  return 0;
}

}  // namespace
}  // namespace wisp

int main(int argc, char** argv) {
  return wisp::run(argc > 1 ? argv[1] : "/dev/shm");
}
