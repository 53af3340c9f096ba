#include "block/image_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <memory>
#include <span>
#include <string_view>

#include "base/checked.h"

namespace wisp {
namespace {

// The bytes that QEMU locks: base + p by who has permission p, and shared + p by who lets nobody else have
// it.
constexpr off_t kPermissionBase = 100;
constexpr off_t kUnsharedBase = 200;
constexpr off_t kConsistentRead = 0;
constexpr off_t kWrite = 1;
constexpr off_t kResize = 3;

constexpr std::uint32_t kMaxAlignment = 4096;

int lock_byte(int fd, off_t byte) {
  struct flock lock{};
  lock.l_type = F_RDLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return ::fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
}

// Whether another open file holds a lock on the byte.
bool locked_elsewhere(int fd, off_t byte) {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

// First the locks, then the look at those of others: of two that start together, both may fail, but never
// both succeed.
Result<void> lock_image(int fd, bool read_only, const std::string& name, Log& log) {
  const std::array<off_t, 4> mine{kPermissionBase + kConsistentRead, kUnsharedBase + kWrite,
                                  kUnsharedBase + kResize, kPermissionBase + kWrite};
  for (const off_t byte : std::span(mine).first(read_only ? 3 : 4)) {
    const int error = lock_byte(fd, byte);
    if (error == EAGAIN || error == EACCES) {
      return fail("is locked by another process; end that one first");
    }
    if (error != 0) {
      log.warning("{}: cannot be locked against use by others ({})", name, errno_text(error));
      return {};
    }
  }
  if (locked_elsewhere(fd, kPermissionBase + kWrite) || locked_elsewhere(fd, kPermissionBase + kResize) ||
      locked_elsewhere(fd, kUnsharedBase + kConsistentRead)) {
    return fail("is in use for writing by another process or drive; end that one, or use a copy");
  }
  if (!read_only && locked_elsewhere(fd, kUnsharedBase + kWrite)) {
    return fail(
        "is in use by another process or drive that relies on its contents; end that one, use a copy, or "
        "give readonly=on to both");
  }
  return {};
}

Result<UniqueFd> open_file(const std::string& path, bool read_only, int flags) {
  // O_NONBLOCK: a FIFO must not hold us up before we can refuse it.
  UniqueFd fd(
      ::open(path.c_str(), (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags));
  if (fd.valid()) {
    return fd;
  }
  const int error = errno;
  switch (error) {
    case ENOENT:
      return fail("does not exist; correct file=, or create it with: truncate -s 1G FILE");
    case EISDIR:
      return fail("is a directory, expected a disk image or a block device");
    case EACCES:
    case EPERM:
      return fail_errno(error, "cannot be opened for {}; change its permissions{}",
                        read_only ? "reading" : "writing", read_only ? "" : ", or give readonly=on");
    case EROFS:
      return fail("lies on a read-only file system; give readonly=on");
    case ETXTBSY:
      return fail("is a program that is running; use a copy, or give readonly=on");
    case EBUSY:
      return fail("is mounted or in use by the host; unmount it, or give readonly=on");
    default:
      return fail_errno(error, "cannot be opened");
  }
}

struct Unmap {
  void operator()(void* page) const { ::munmap(page, 2UL * kMaxAlignment); }
};

// The least power of two from 512 on with which direct reads at the start of the file succeed, for the
// offset and then for memory.
bool probe_alignment(ImageFile& image) {
  void* const mapped =
      ::mmap(nullptr, 2UL * kMaxAlignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return false;
  }
  const std::unique_ptr<void, Unmap> owner(mapped);
  auto* const page = static_cast<std::uint8_t*>(mapped);
  const auto reads = [&](std::uint32_t memory, std::uint32_t length) {
    return ::pread(image.direct.get(), page + (memory % kMaxAlignment), length, 0) >= 0;
  };
  std::uint32_t offset = 512;
  while (offset <= kMaxAlignment && !reads(0, offset)) {
    offset *= 2;
  }
  std::uint32_t memory = 512;
  while (memory < kMaxAlignment && !reads(memory, offset)) {
    memory *= 2;
  }
  image.offset_alignment = offset;
  image.memory_alignment = memory;
  return offset <= kMaxAlignment;
}

// Whether O_DIRECT works here; fills in its alignments.
bool find_alignment(ImageFile& image) {
  struct statx info{};
  if (::statx(image.direct.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    if (info.stx_dio_mem_align == 0 || info.stx_dio_offset_align == 0) {
      return false;
    }
    image.memory_alignment = std::bit_ceil(info.stx_dio_mem_align);
    image.offset_alignment = std::max(std::bit_ceil(info.stx_dio_offset_align), 512U);
    return image.memory_alignment <= kMaxAlignment && image.offset_alignment <= kMaxAlignment;
  }
  return probe_alignment(image);
}

Result<void> open_direct(ImageFile& image, const ImageOpenOptions& options) {
  auto opened = open_file(options.path, options.read_only, O_DIRECT);
  bool works = opened.has_value();
  if (works) {
    image.direct = *std::move(opened);
    struct stat info{};
    if (::fstat(image.direct.get(), &info) != 0 || info.st_dev != image.device ||
        info.st_ino != image.inode) {
      return fail("was replaced by another file while it was opened; try again");
    }
    works = find_alignment(image);
  }
  if (works) {
    return {};
  }
  image.direct.reset();
  if (options.direct.has_value()) {
    return fail("lies on a file system without direct I/O; give direct=off");
  }
  return {};
}

void set_blocking(const UniqueFd& fd) {
  // io_uring fails with EAGAIN on a non-blocking file where it would have to wait.
  if (fd.valid()) {
    ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK);
  }
}

Result<void> describe_block_device(ImageFile& image) {
  int logical = 0;
  unsigned physical = 0;
  if (::ioctl(image.buffered.get(), BLKSSZGET, &logical) != 0 ||
      ::ioctl(image.buffered.get(), BLKPBSZGET, &physical) != 0 || logical < 512) {
    return fail_errno(errno, "is a block device that does not tell its block size");
  }
  image.logical_block_size = static_cast<std::uint32_t>(logical);
  image.physical_block_size = std::max(physical, image.logical_block_size);
  return {};
}

// The format that the first bytes look like, or empty.
std::string_view guess_format(int fd) {
  std::array<char, 8> bytes{};
  if (::pread(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return {};
  }
  struct Magic {
    std::string_view bytes;
    std::string_view format;
  };
  static constexpr std::array<Magic, 5> kMagics{
      {{"QFI\xfb", "qcow2"}, {"KDMV", "vmdk"}, {"vhdxfile", "vhdx"}, {"conectix", "vpc"}, {"QED", "qed"}}};
  const std::string_view start(bytes.data(), bytes.size());
  for (const Magic& magic : kMagics) {
    if (start.starts_with(magic.bytes)) {
      return magic.format;
    }
  }
  return {};
}

// Present size of the file or device, in bytes.
Result<std::uint64_t> image_size(const ImageFile& image) {
  if (image.block_device) {
    std::uint64_t size = 0;
    if (::ioctl(image.buffered.get(), BLKGETSIZE64, &size) != 0) {
      return fail_errno(errno, "is a block device that does not tell its size");
    }
    return size;
  }
  struct stat info{};
  if (::fstat(image.buffered.get(), &info) != 0) {
    return fail_errno(errno, "cannot be examined");
  }
  return static_cast<std::uint64_t>(info.st_size);
}

}  // namespace

Result<ImageFile> open_image(const ImageOpenOptions& options, const std::string& name, Log& log) {
  ImageFile image;
  WISP_ASSIGN(image.buffered, open_file(options.path, options.read_only, 0));
  struct stat info{};
  if (::fstat(image.buffered.get(), &info) != 0) {
    return fail_errno(errno, "cannot be examined");
  }
  if (S_ISDIR(info.st_mode)) {
    return fail("is a directory, expected a disk image or a block device");
  }
  if (!S_ISREG(info.st_mode) && !S_ISBLK(info.st_mode)) {
    return fail("is neither a regular file nor a block device");
  }
  image.block_device = S_ISBLK(info.st_mode);
  image.device = info.st_dev;
  image.inode = info.st_ino;
  if (image.block_device && !options.read_only) {
    // On a block device O_EXCL means: nobody has it mounted or otherwise claimed.
    WISP_ASSIGN(UniqueFd claimed, open_file(options.path, false, O_EXCL));
    struct stat again{};
    if (::fstat(claimed.get(), &again) != 0 || again.st_rdev != info.st_rdev) {
      return fail("was replaced by another file while it was opened; try again");
    }
    image.buffered = std::move(claimed);
  }
  WISP_TRY(lock_image(image.buffered.get(), options.read_only, name, log));
  if (image.block_device) {
    WISP_TRY(describe_block_device(image));
  } else {
    const auto block = static_cast<std::uint32_t>(std::clamp<blksize_t>(info.st_blksize, 512, kMaxAlignment));
    image.physical_block_size = std::bit_floor(block);
  }
  WISP_ASSIGN(image.size, image_size(image));
  if (image.size < 512) {
    return fail("has {} bytes, a disk needs at least 512; enlarge it with: truncate -s 1G FILE", image.size);
  }
  if (const std::string_view format = guess_format(image.buffered.get()); !format.empty()) {
    log.warning(
        "{}: looks like a {} image but is used as format=raw; convert it with: qemu-img convert -O raw", name,
        format);
  }
  if (!is_aligned(image.size, 512)) {
    log.warning("{}: has {} bytes, no multiple of 512; the last {} are out of the guest's reach", name,
                image.size, image.size % 512);
  }
  if (options.direct.value_or(true)) {
    WISP_TRY(open_direct(image, options));
  }
  set_blocking(image.buffered);
  set_blocking(image.direct);
  return image;
}

}  // namespace wisp
