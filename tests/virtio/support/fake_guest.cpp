#include "virtio/support/fake_guest.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "base/checked.h"
#include "base/error.h"

namespace wisp::test {

FakeGuest::FakeGuest(std::vector<Range> ranges, Backing backing) : ranges_(std::move(ranges)) {
  for (const Range& range : ranges_) {
    void* host = ::mmap(nullptr, range.size + kPageSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    WISP_ASSERT(host != MAP_FAILED);
    constexpr int kAccess = PROT_READ | PROT_WRITE;
    int fd = -1;
    if (backing == Backing::kShared) {
      fd = ::memfd_create("fake-guest", MFD_CLOEXEC);
      WISP_ASSERT(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(range.size)) == 0);
      WISP_ASSERT(::mmap(host, range.size, kAccess, MAP_SHARED | MAP_FIXED, fd, 0) == host);
    }
    WISP_ASSERT(::mprotect(host, range.size, kAccess) == 0);
    blocks_.push_back({.gpa = range.gpa,
                       .size = range.size,
                       .host = static_cast<std::uint8_t*>(host),
                       .fd = fd,
                       .dirty = std::make_shared<DirtyBitmap>(range.size)});
  }
  memory_.set_blocks(blocks_);
  next_ = base();
}

FakeGuest::~FakeGuest() {
  for (const GuestMemoryBlock& block : blocks_) {
    ::munmap(block.host, block.size + kPageSize);
    if (block.fd >= 0) {
      ::close(block.fd);
    }
  }
}

Gpa FakeGuest::allocate(std::uint64_t size, std::uint64_t alignment) {
  const Gpa at = align_up(next_, alignment).value();
  WISP_ASSERT(at <= end() && size <= end() - at);
  next_ = at + size;
  return at;
}

Gpa FakeGuest::allocate(std::span<const std::uint8_t> bytes) {
  const Gpa at = allocate(bytes.size());
  write(at, bytes);
  return at;
}

void FakeGuest::clear() {
  for (const GuestMemoryBlock& block : blocks_) {
    std::memset(block.host, 0, block.size);
  }
  next_ = base();
}

void FakeGuest::write(Gpa gpa, std::span<const std::uint8_t> bytes) {
  WISP_ASSERT(memory_.write(gpa, bytes));
}

void FakeGuest::write(Gpa gpa, std::string_view text) {
  write(gpa, std::span(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()));
}

std::vector<std::uint8_t> FakeGuest::read(Gpa gpa, std::size_t size) const {
  std::vector<std::uint8_t> bytes(size);
  WISP_ASSERT(memory_.read(gpa, bytes));
  return bytes;
}

std::string FakeGuest::read_text(Gpa gpa, std::size_t size) const {
  const std::vector<std::uint8_t> bytes = read(gpa, size);
  return {bytes.begin(), bytes.end()};
}

std::vector<bool> FakeGuest::take_dirty_pages() {
  const std::vector<std::uint64_t> words = blocks_.front().dirty->take();
  std::vector<bool> pages(blocks_.front().size / kPageSize);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    pages[i] = ((words[i / 64] >> (i % 64)) & 1) != 0;
  }
  return pages;
}

}  // namespace wisp::test
