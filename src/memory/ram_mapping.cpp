#include "memory/ram_mapping.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "base/checked.h"
#include "memory/gpa.h"

namespace wisp {
namespace {

constexpr std::uint64_t kHugePage = 2ULL << 20;
constexpr int kMadvPopulateWrite = 23;  // Linux 5.14; older C libraries do not name it
constexpr std::uint64_t kPopulateShare = 256ULL << 20;
constexpr std::uint64_t kMaxPopulateThreads = 8;

// The page size as mmap(2) and memfd_create(2) want it in their flags.
unsigned huge_page_flag(std::uint64_t page_size) {
  return static_cast<unsigned>(std::countr_zero(page_size)) << 26;
}

Result<std::uint64_t> checked_huge_page_size(const RamOptions& options) {
  const std::uint64_t size = options.huge_page_size.value_or(0);
  if (!std::has_single_bit(size) || size <= kPageSize) {
    return fail("memory: {} is no huge page size; x86-64 has 2 MiB and 1 GiB", size_text(size));
  }
  return size;
}

Result<UniqueFd> open_directory_file(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_TMPFILE | O_CLOEXEC | O_EXCL, 0600));
  if (fd.valid()) {
    return fd;
  }
  // hugetlbfs of older kernels has no O_TMPFILE.
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) {
    return fail_errno(errno, "memory: cannot create a file in mem-path {}", path);
  }
  std::string name = path + "/wisp-ram-XXXXXX";
  fd = UniqueFd(::mkostemp(name.data(), O_CLOEXEC));
  if (!fd.valid()) {
    return fail_errno(errno, "memory: cannot create a file in mem-path {}", path);
  }
  ::unlink(name.c_str());
  return fd;
}

Result<UniqueFd> open_ram_file(const RamOptions& options, FreshFile& created) {
  struct stat info{};
  if (::stat(options.path.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) {
      return open_directory_file(options.path);
    }
    if (!S_ISREG(info.st_mode)) {
      return fail("memory: mem-path {} is neither a file nor a directory", options.path);
    }
  }
  UniqueFd fd(::open(options.path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd.valid() && errno == ENOENT) {
    fd = UniqueFd(::open(options.path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (fd.valid()) {
      created = FreshFile(options.path, fd.get());
    } else if (errno == EEXIST) {
      // Another machine that shares it was quicker, or it is a link to where nothing is yet.
      fd = UniqueFd(::open(options.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    }
  }
  if (!fd.valid() && !options.share && (errno == EACCES || errno == EROFS)) {
    // A private mapping never writes the file, so a read-only template will do.
    fd = UniqueFd(::open(options.path.c_str(), O_RDONLY | O_CLOEXEC));
  }
  if (!fd.valid()) {
    return fail_errno(errno, "memory: cannot open mem-path {}", options.path);
  }
  return fd;
}

Result<RamStore> open_file_store(const RamOptions& options) {
  if (options.path.empty()) {
    return fail("memory: a file as guest RAM needs mem-path");
  }
  RamStore store;
  store.shared = options.share;
  WISP_ASSIGN(store.fd, open_ram_file(options, store.created));
  struct statfs fs{};
  struct stat info{};
  if (::fstatfs(store.fd.get(), &fs) != 0 || ::fstat(store.fd.get(), &info) != 0) {
    return fail_errno(errno, "memory: cannot examine mem-path {}", options.path);
  }
  store.page_size = fs.f_type == HUGETLBFS_MAGIC ? static_cast<std::uint64_t>(fs.f_bsize) : kPageSize;
  if (!is_aligned(options.size, store.page_size)) {
    return fail("memory: size {} is not a multiple of the page size {} of mem-path {}",
                size_text(options.size), size_text(store.page_size), options.path);
  }
  if (static_cast<std::uint64_t>(info.st_size) < options.size &&
      ::ftruncate(store.fd.get(), static_cast<off_t>(options.size)) != 0) {
    return fail_errno(errno, "memory: cannot make mem-path {} {} long (it has {})", options.path,
                      size_text(options.size), size_text(static_cast<std::uint64_t>(info.st_size)));
  }
  return store;
}

Result<RamStore> open_memfd_store(const RamOptions& options) {
  RamStore store;
  store.shared = true;
  store.page_size = kPageSize;
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (options.huge_page_size) {
    WISP_ASSIGN(store.page_size, checked_huge_page_size(options));
    flags |= MFD_HUGETLB | huge_page_flag(store.page_size);
  }
  store.fd = UniqueFd(::memfd_create("wisp-ram", flags));
  if (!store.fd.valid()) {
    return fail_errno(errno, "memory: cannot create a memfd with pages of {}", size_text(store.page_size));
  }
  if (::ftruncate(store.fd.get(), static_cast<off_t>(options.size)) != 0) {
    return fail_errno(errno, "memory: cannot make a memfd of {}", size_text(options.size));
  }
  // A process that maps it (vhost-user) must not be able to shrink it under the guest: that would be SIGBUS.
  if (::fcntl(store.fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return fail_errno(errno, "memory: cannot seal the memfd");
  }
  return store;
}

// The number behind `key` in /proc/meminfo, in bytes; 0 where there is none.
std::uint64_t meminfo_bytes(std::string_view text, std::string_view key) {
  const std::size_t at = text.find(key);
  if (at == std::string_view::npos) {
    return 0;
  }
  text.remove_prefix(at + key.size());
  text.remove_prefix(std::min(text.find_first_of("0123456789"), text.size()));
  std::uint64_t kib = 0;
  std::from_chars(text.data(), text.data() + text.size(), kib);
  return kib << 10;
}

// What the host could give without killing anybody; nothing where it does not say.
std::uint64_t host_available_bytes() {
  const UniqueFd fd(::open("/proc/meminfo", O_RDONLY | O_CLOEXEC));
  std::string text(8192, '\0');
  const ssize_t count = fd.valid() ? ::read(fd.get(), text.data(), text.size()) : 0;
  if (count <= 0) {
    return UINT64_MAX;
  }
  text.resize(static_cast<std::size_t>(count));
  const std::uint64_t available = meminfo_bytes(text, "MemAvailable:");
  return available == 0 ? UINT64_MAX : available + meminfo_bytes(text, "SwapFree:");
}

// Returns an errno value, 0 for success.
int populate_range(std::uint8_t* host, std::uint64_t size, std::uint64_t page_size) {
  while (::madvise(host, size, kMadvPopulateWrite) != 0) {
    if (errno == EINTR || errno == EAGAIN) {
      continue;
    }
    if (errno != EINVAL) {
      return errno;
    }
    // A kernel before 5.14: touch each page without changing it.
    for (std::uint64_t at = 0; at < size; at += page_size) {
      __atomic_fetch_or(host + at, 0, __ATOMIC_RELAXED);
    }
    return 0;
  }
  return 0;
}

}  // namespace

std::string size_text(std::uint64_t bytes) {
  if (bytes >= (1ULL << 30) && is_aligned(bytes, 1ULL << 30)) {
    return fmt::format("{} GiB", bytes >> 30);
  }
  if (bytes >= (1ULL << 20) && is_aligned(bytes, 1ULL << 20)) {
    return fmt::format("{} MiB", bytes >> 20);
  }
  if (bytes >= 1024 && is_aligned(bytes, 1024)) {
    return fmt::format("{} KiB", bytes >> 10);
  }
  return fmt::format("{} bytes", bytes);
}

Result<RamStore> open_ram_store(const RamOptions& options) {
  if (options.size == 0 || !is_aligned(options.size, kPageSize) || options.size > (1ULL << 47)) {
    return fail("memory: size {} is not a multiple of 4 KiB between 4 KiB and 128 TiB",
                size_text(options.size));
  }
  if (options.huge_page_size) {
    if (options.source == RamSource::kFile) {
      return fail("memory: a page size cannot be chosen for mem-path {}; mount hugetlbfs with it",
                  options.path);
    }
    WISP_ASSIGN(const std::uint64_t page_size, checked_huge_page_size(options));
    if (!is_aligned(options.size, page_size)) {
      return fail("memory: size {} is not a multiple of the huge page size {}", size_text(options.size),
                  size_text(page_size));
    }
  }
  switch (options.source) {
    case RamSource::kMemfd:
      return open_memfd_store(options);
    case RamSource::kFile:
      return open_file_store(options);
    case RamSource::kAnonymous:
      break;
  }
  return RamStore{.fd = {}, .shared = options.share, .page_size = options.huge_page_size.value_or(kPageSize)};
}

Result<std::uint8_t*> map_ram(const RamStore& store, std::uint64_t size, bool prealloc) {
  const bool huge = store.page_size > kPageSize;
  unsigned flags = store.shared ? MAP_SHARED : MAP_PRIVATE;
  if (!store.fd.valid()) {
    flags |= MAP_ANONYMOUS;
    if (huge) {
      flags |= MAP_HUGETLB | huge_page_flag(store.page_size);
    }
  }
  // Huge pages are reserved even without prealloc: a guest that meets an empty pool is a SIGBUS.
  if (!huge && !prealloc) {
    flags |= MAP_NORESERVE;
  }
  const std::uint64_t alignment = std::max(store.page_size, size >= kHugePage ? kHugePage : kPageSize);
  const std::uint64_t reserved_size = size + alignment;
  void* reserved =
      ::mmap(nullptr, reserved_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) {
    return fail_errno(errno, "memory: no address space for {}", size_text(size));
  }
  const std::uint64_t start = reinterpret_cast<std::uintptr_t>(reserved);
  const std::uint64_t pad = (alignment - start % alignment) % alignment;
  std::uint8_t* const at = static_cast<std::uint8_t*>(reserved) + pad;
  void* mapped =
      ::mmap(at, size, PROT_READ | PROT_WRITE, static_cast<int>(flags) | MAP_FIXED, store.fd.get(), 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    ::munmap(reserved, reserved_size);
    if (huge && error == ENOMEM) {
      return fail(
          "memory: the host has not {} free in huge pages of {}; add some to "
          "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
          size_text(size), size_text(store.page_size), store.page_size >> 10);
    }
    return fail_errno(error, "memory: cannot map {}", size_text(size));
  }
  if (pad > 0) {
    ::munmap(reserved, pad);
  }
  if (pad < alignment) {
    ::munmap(at + size, alignment - pad);
  }
  return at;
}

FreshFile::FreshFile(std::string path, int fd) {
  struct stat made{};
  if (::fstat(fd, &made) == 0) {
    path_ = std::move(path);
    device_ = made.st_dev;
    inode_ = made.st_ino;
  }
}

FreshFile::~FreshFile() {
  struct stat now{};
  if (!path_.empty() && ::lstat(path_.c_str(), &now) == 0 && now.st_dev == device_ && now.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

Result<void> populate_ram(std::uint8_t* host, std::uint64_t size, std::uint64_t page_size) {
  if (page_size == kPageSize) {
    // Asked first, because the kernel would rather kill a process than refuse.
    const std::uint64_t available = host_available_bytes();
    if (size > available) {
      return fail("memory: cannot preallocate {}: the host has {} MiB available", size_text(size),
                  available >> 20);
    }
  }
  const std::uint64_t cpus = std::max(1U, std::thread::hardware_concurrency());
  const std::uint64_t wanted = std::min({cpus, kMaxPopulateThreads, size / kPopulateShare + 1});
  const std::uint64_t share = align_down(size / wanted, page_size);
  std::atomic<int> error = 0;
  {
    std::vector<std::jthread> threads;
    std::uint64_t done = 0;
    const auto add_thread = [&](std::uint8_t* part) {
      try {
        threads.emplace_back([&error, part, share, page_size] {
          if (const int result = populate_range(part, share, page_size); result != 0) {
            error.store(result, std::memory_order_relaxed);
          }
        });
        return true;
      } catch (const std::system_error&) {
        return false;
      }
    };
    // Where the host gives no more threads, what is left is done here.
    for (std::uint64_t i = 1; i < wanted && share > 0 && add_thread(host + done); ++i) {
      done += share;
    }
    if (const int result = populate_range(host + done, size - done, page_size); result != 0) {
      error.store(result, std::memory_order_relaxed);
    }
  }
  if (error != 0) {
    // EFAULT is what a full tmpfs or huge page pool gives.
    return fail_errno(error == EFAULT ? ENOMEM : error.load(), "memory: cannot preallocate {}",
                      size_text(size));
  }
  return {};
}

}  // namespace wisp
