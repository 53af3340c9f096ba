#include "hypervisor/soft/code_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/unique_fd.h"

namespace wisp::soft {

namespace {

constexpr std::size_t kLargePage = 2U << 20;

// Maps the file at an address where the host can use large pages: code is used here and there, and the
// processor remembers few small pages of it.
std::uint8_t* map_aligned(int fd, std::size_t size, int protection) {
  void* space =
      ::mmap(nullptr, size + kLargePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) {
    return nullptr;
  }
  auto* start = static_cast<std::uint8_t*>(space);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(start) & (kLargePage - 1);
  void* mapped = ::mmap(start + before, size, protection, MAP_SHARED | MAP_FIXED, fd, 0);
  const int error = errno;
  if (before != 0) {
    ::munmap(start, before);
  }
  ::munmap(start + before + size, kLargePage - before);
  if (mapped == MAP_FAILED) {
    ::munmap(start + before, size);
    errno = error;
    return nullptr;
  }
  (void)::madvise(mapped, size, MADV_HUGEPAGE);
  return static_cast<std::uint8_t*>(mapped);
}

}  // namespace

Result<CodeMemory> CodeMemory::create(std::size_t size) {
  const UniqueFd fd(::memfd_create("wisp-code", MFD_CLOEXEC));
  if (!fd.valid() || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
    return fail_errno(errno, "cannot make {} bytes of memory for generated code", size);
  }
  std::uint8_t* writable = map_aligned(fd.get(), size, PROT_READ | PROT_WRITE);
  if (writable == nullptr) {
    return fail_errno(errno, "cannot map {} bytes for generated code", size);
  }
  const std::uint8_t* executable = map_aligned(fd.get(), size, PROT_READ | PROT_EXEC);
  if (executable == nullptr) {
    const int error = errno;
    ::munmap(writable, size);
    return fail_errno(error,
                      "cannot map generated code as executable; does the host forbid it (SELinux execmem, "
                      "/dev/shm mounted noexec)?");
  }
  return CodeMemory(writable, executable, size);
}

void CodeMemory::prepare(std::size_t& prepared, std::size_t end) {
  constexpr std::size_t kStep = kLargePage;
  // Of Linux 5.14; the C library's headers may be older.
  constexpr int kPopulateRead = 22;
  constexpr int kPopulateWrite = 23;
  while (prepared < end && prepared < size_) {
    const std::size_t step = std::min(kStep, size_ - prepared);
    (void)::madvise(writable_ + prepared, step, kPopulateWrite);
    (void)::madvise(const_cast<std::uint8_t*>(executable_) + prepared, step, kPopulateRead);
    prepared += step;
  }
}

CodeMemory::CodeMemory(CodeMemory&& other) noexcept
    : writable_(std::exchange(other.writable_, nullptr)),
      executable_(std::exchange(other.executable_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

CodeMemory::~CodeMemory() {
  if (writable_ != nullptr) {
    ::munmap(writable_, size_);
    ::munmap(const_cast<std::uint8_t*>(executable_), size_);
  }
}

}  // namespace wisp::soft
