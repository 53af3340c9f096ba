#include "hypervisor/soft/code_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/unique_fd.h"

namespace wisp::soft {

Result<CodeMemory> CodeMemory::create(std::size_t size) {
  const UniqueFd fd(::memfd_create("wisp-code", MFD_CLOEXEC));
  if (!fd.valid() || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
    return fail_errno(errno, "cannot make {} bytes of memory for generated code", size);
  }
  void* writable = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (writable == MAP_FAILED) {
    return fail_errno(errno, "cannot map {} bytes for generated code", size);
  }
  void* executable = ::mmap(nullptr, size, PROT_READ | PROT_EXEC, MAP_SHARED, fd.get(), 0);
  if (executable == MAP_FAILED) {
    const int error = errno;
    ::munmap(writable, size);
    return fail_errno(error,
                      "cannot map generated code as executable; does the host forbid it (SELinux execmem, "
                      "/dev/shm mounted noexec)?");
  }
  return CodeMemory(static_cast<std::uint8_t*>(writable), static_cast<const std::uint8_t*>(executable), size);
}

void CodeMemory::prepare(std::size_t end) {
  constexpr std::size_t kStep = 1U << 20;
  // Of Linux 5.14; the C library's headers may be older.
  constexpr int kPopulateRead = 22;
  constexpr int kPopulateWrite = 23;
  while (prepared_ < end && prepared_ < size_) {
    const std::size_t step = std::min(kStep, size_ - prepared_);
    (void)::madvise(writable_ + prepared_, step, kPopulateWrite);
    (void)::madvise(const_cast<std::uint8_t*>(executable_) + prepared_, step, kPopulateRead);
    prepared_ += step;
  }
}

CodeMemory::CodeMemory(CodeMemory&& other) noexcept
    : writable_(std::exchange(other.writable_, nullptr)),
      executable_(std::exchange(other.executable_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      prepared_(other.prepared_) {}

CodeMemory::~CodeMemory() {
  if (writable_ != nullptr) {
    ::munmap(writable_, size_);
    ::munmap(const_cast<std::uint8_t*>(executable_), size_);
  }
}

}  // namespace wisp::soft
