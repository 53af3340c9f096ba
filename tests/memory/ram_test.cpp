#include "memory/ram.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "memory/gpa.h"

namespace wisp {
namespace {

class TempDir {
 public:
  TempDir() {
    std::string name = "/tmp/wisp-ram-test-XXXXXX";
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string file(const std::string& name) const { return path_ + "/" + name; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::uint8_t pattern(std::uint64_t at) {
  return static_cast<std::uint8_t>(at * 7 + at / 256 + 1);
}

// A file whose byte at i is pattern(i).
UniqueFd pattern_file(std::uint64_t size) {
  UniqueFd fd(::memfd_create("pattern", MFD_CLOEXEC));
  std::vector<std::uint8_t> bytes(size);
  for (std::uint64_t i = 0; i < size; ++i) {
    bytes[i] = pattern(i);
  }
  EXPECT_EQ(::write(fd.get(), bytes.data(), size), static_cast<ssize_t>(size));
  return fd;
}

std::unique_ptr<RamBlock> must_create(const RamOptions& options) {
  auto block = RamBlock::create(options);
  EXPECT_TRUE(block.has_value()) << (block.has_value() ? "" : block.error().message);
  if (!block.has_value()) {
    return nullptr;
  }
  (*block)->keep_file();
  return *std::move(block);
}

std::string error_of(const RamOptions& options) {
  const auto block = RamBlock::create(options);
  return block.has_value() ? "" : block.error().message;
}

// Pages of [host, host + size) that the process has in memory.
std::size_t resident_pages(const RamBlock& block) {
  std::vector<unsigned char> map(block.size() / kPageSize);
  EXPECT_EQ(::mincore(block.host(), block.size(), map.data()), 0);
  return static_cast<std::size_t>(
      std::count_if(map.begin(), map.end(), [](unsigned char c) { return c & 1; }));
}

TEST(RamBlock, AnonymousMemoryIsZeroAlignedAndLazy) {
  const auto block = must_create({.size = 8 << 20});
  EXPECT_EQ(block->size(), 8U << 20);
  EXPECT_EQ(block->fd(), -1);
  EXPECT_FALSE(block->shared());
  EXPECT_EQ(block->page_size(), kPageSize);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block->host()) % (2 << 20), 0U);
  EXPECT_EQ(resident_pages(*block), 0U);
  EXPECT_EQ(block->host()[12345], 0);
  block->host()[block->size() - 1] = 1;
}

TEST(RamBlock, SizesThatMakeNoSenseAreRefused) {
  EXPECT_NE(error_of({.size = 0}), "");
  EXPECT_NE(error_of({.size = 4097}).find("4097 bytes"), std::string::npos);
  EXPECT_NE(error_of({.size = UINT64_MAX - 4095}), "");
  EXPECT_NE(error_of({.size = 1ULL << 47}).find("no address space"), std::string::npos);
  EXPECT_NE(error_of({.size = 4 << 20, .huge_page_size = 12345}).find("12345"), std::string::npos);
  EXPECT_NE(error_of({.size = 3 << 20, .huge_page_size = 2 << 20}).find("multiple of the huge page size"),
            std::string::npos);
  EXPECT_NE(error_of({.size = 4096, .source = RamSource::kFile}).find("mem-path"), std::string::npos);
}

TEST(RamBlock, MemfdCanBeMappedElsewhereAndNotShrunk) {
  const auto block = must_create({.size = 1 << 20, .source = RamSource::kMemfd});
  ASSERT_GE(block->fd(), 0);
  EXPECT_TRUE(block->shared());
  block->host()[5000] = 77;
  void* other = ::mmap(nullptr, 1 << 20, PROT_READ, MAP_SHARED, block->fd(), 0);
  ASSERT_NE(other, MAP_FAILED);
  EXPECT_EQ(static_cast<std::uint8_t*>(other)[5000], 77);
  ::munmap(other, 1 << 20);
  EXPECT_NE(::ftruncate(block->fd(), 4096), 0);
}

TEST(RamBlock, SharedFileIsWrittenAndGrownButNeverShrunk) {
  const TempDir dir;
  const std::string path = dir.file("ram");
  {
    const auto block =
        must_create({.size = 64 << 10, .source = RamSource::kFile, .path = path, .share = true});
    block->host()[100] = 42;
  }
  EXPECT_EQ(std::filesystem::file_size(path), 64U << 10);
  {
    const auto block =
        must_create({.size = 32 << 10, .source = RamSource::kFile, .path = path, .share = true});
    EXPECT_EQ(block->host()[100], 42);
  }
  EXPECT_EQ(std::filesystem::file_size(path), 64U << 10);
}

TEST(RamBlock, PrivateFileKeepsTheFileAsItWas) {
  const TempDir dir;
  const std::string path = dir.file("template");
  std::ofstream(path) << std::string(8192, 'x');
  ::chmod(path.c_str(), 0444);
  const auto block = must_create({.size = 8192, .source = RamSource::kFile, .path = path});
  EXPECT_FALSE(block->shared());
  EXPECT_EQ(block->host()[0], 'x');
  block->host()[0] = 'y';
  std::ifstream in(path);
  EXPECT_EQ(in.get(), 'x');
}

TEST(RamBlock, AFileThatWasMadeGoesAgainOnlyWhileItIsThatOne) {
  const TempDir dir;
  const std::string path = dir.path() + "/ram";
  const RamOptions options{.size = 8192, .source = RamSource::kFile, .path = path, .share = true};
  ASSERT_TRUE(RamBlock::create(options).has_value());  // and destroyed
  EXPECT_FALSE(std::filesystem::exists(path));
  {
    const auto block = RamBlock::create(options);
    ASSERT_TRUE(block.has_value());
    std::filesystem::rename(path, path + ".old");
    std::ofstream(path) << "another machine's";
  }
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST(RamBlock, DirectoryAsPathLeavesNothingBehind) {
  const TempDir dir;
  const auto block =
      must_create({.size = 1 << 20, .source = RamSource::kFile, .path = dir.path(), .share = true});
  block->host()[0] = 1;
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(RamBlock, PathsThatCannotBeRamAreNamedInTheError) {
  EXPECT_NE(
      error_of({.size = 4096, .source = RamSource::kFile, .path = "/nonexistent/x"}).find("/nonexistent/x"),
      std::string::npos);
  // A file that it made itself goes again.
  const std::string too_long = "/tmp/wisp-ram-test-" + std::to_string(::getpid());
  EXPECT_NE(error_of({.size = 1ULL << 47, .source = RamSource::kFile, .path = too_long}), "");
  EXPECT_NE(::access(too_long.c_str(), F_OK), 0);
  EXPECT_NE(error_of({.size = 4096, .source = RamSource::kFile, .path = "/dev/null"}).find("/dev/null"),
            std::string::npos);
  EXPECT_NE(error_of({.size = 2 << 20, .source = RamSource::kFile, .path = "/tmp", .huge_page_size = 2 << 20})
                .find("hugetlbfs"),
            std::string::npos);
}

TEST(RamBlock, PreallocTakesEveryPage) {
  for (const RamSource source : {RamSource::kAnonymous, RamSource::kMemfd}) {
    const auto block = must_create({.size = 4 << 20, .source = source, .prealloc = true});
    EXPECT_EQ(resident_pages(*block), (4U << 20) / kPageSize);
  }
}

TEST(RamBlock, PreallocOfMoreThanTheHostHasIsAnError) {
  const std::string error = error_of({.size = 1ULL << 44, .prealloc = true});
  EXPECT_NE(error.find("16384 GiB"), std::string::npos) << error;
}

TEST(RamBlock, HugePagesWorkOrSayWhatIsMissing) {
  for (const RamSource source : {RamSource::kAnonymous, RamSource::kMemfd}) {
    auto block = RamBlock::create({.size = 4 << 20, .source = source, .huge_page_size = 2 << 20});
    if (block.has_value()) {
      EXPECT_EQ((*block)->page_size(), 2U << 20);
      (*block)->host()[0] = 1;
      EXPECT_TRUE((*block)->discard(0, 4 << 20).has_value());
      EXPECT_EQ((*block)->host()[0], 0);
    } else {
      EXPECT_NE(block.error().message.find("2 MiB"), std::string::npos) << block.error().message;
    }
  }
}

TEST(RamBlock, DumpAndMergeAreAdvice) {
  const auto block = must_create({.size = 1 << 20, .dump = false});
  std::ifstream smaps("/proc/self/smaps");
  const std::string start = fmt::format("{:x}-", reinterpret_cast<std::uintptr_t>(block->host()));
  bool inside = false;
  bool found = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.starts_with(start)) {
      inside = true;
    } else if (inside && line.starts_with("VmFlags:")) {
      found = line.find(" dd") != std::string::npos;
      break;
    }
  }
  EXPECT_TRUE(found);
  auto merged = RamBlock::create({.size = 1 << 20, .merge = true});
  if (!merged.has_value()) {
    EXPECT_NE(merged.error().message.find("KSM"), std::string::npos);
  }
}

struct LoadCase {
  std::uint64_t offset;
  std::uint64_t file_offset;
  std::uint64_t size;
};

class RamLoad : public ::testing::TestWithParam<std::tuple<LoadCase, RamSource>> {};

// The loaded bytes and no others change, whatever the alignment and kind of memory.
TEST_P(RamLoad, GivesTheFilesBytesAndTouchesNoOthers) {
  const auto& [c, source] = GetParam();
  const auto block = must_create({.size = 64 << 10, .source = source});
  std::memset(block->host(), 0xaa, block->size());
  const UniqueFd file = pattern_file(40000);
  const auto loaded = block->load_file(c.offset, file.get(), c.file_offset, c.size);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().message;
  for (std::uint64_t i = 0; i < block->size(); ++i) {
    const bool inside = i >= c.offset && i < c.offset + c.size;
    ASSERT_EQ(block->host()[i], inside ? pattern(i - c.offset + c.file_offset) : 0xaa) << i;
  }
  // Copy-on-write: the guest's writes stay its own.
  std::memset(block->host(), 0x55, block->size());
  std::uint8_t byte = 0;
  ASSERT_EQ(::pread(file.get(), &byte, 1, 8192), 1);
  EXPECT_EQ(byte, pattern(8192));
  // What was loaded reads as zero when it was given back.
  ASSERT_TRUE(block->discard(0, block->size()).has_value());
  for (std::uint64_t i = 0; i < block->size(); ++i) {
    ASSERT_EQ(block->host()[i], 0) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Alignments, RamLoad,
    ::testing::Combine(::testing::Values(LoadCase{0, 0, 40000}, LoadCase{0, 0, 8192},
                                         LoadCase{4096, 0, 39999}, LoadCase{100, 100, 30000},
                                         LoadCase{100, 100, 50}, LoadCase{100, 0, 30000},
                                         LoadCase{4096, 4096, 1}, LoadCase{4095, 4095, 4098},
                                         LoadCase{4095, 8191, 2}, LoadCase{0, 0, 0},
                                         LoadCase{25536, 0, 40000}, LoadCase{65535, 39999, 1}),
                       ::testing::Values(RamSource::kAnonymous, RamSource::kMemfd)));

TEST(RamBlock, WholePagesAreMappedNotCopied) {
  const TempDir dir;
  const std::string path = dir.file("kernel");
  std::ofstream(path) << std::string(1 << 20, 'k');
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  const auto block = must_create({.size = 4 << 20});
  ASSERT_TRUE(block->load_file(1 << 20, fd.get(), 0, 1 << 20).has_value());
  std::ifstream maps("/proc/self/maps");
  bool found = false;
  for (std::string line; std::getline(maps, line);) {
    found = found || (line.find(path) != std::string::npos && line.find("rw-p") != std::string::npos);
  }
  EXPECT_TRUE(found);
  EXPECT_EQ(block->host()[(1 << 20) + 5], 'k');
}

TEST(RamBlock, LoadErrorsSayWhatIsWrong) {
  const auto block = must_create({.size = 64 << 10});
  const UniqueFd file = pattern_file(10000);
  EXPECT_NE(block->load_file(0, file.get(), 0, 10001).error().message.find("too short"), std::string::npos);
  EXPECT_NE(block->load_file(0, file.get(), 10000, 1).error().message.find("too short"), std::string::npos);
  EXPECT_FALSE(block->load_file(0, file.get(), UINT64_MAX, 2).has_value());
  EXPECT_NE(block->load_file((64 << 10) - 10, file.get(), 0, 11).error().message.find("do not fit"),
            std::string::npos);
  EXPECT_FALSE(block->load_file(UINT64_MAX, file.get(), 0, 1).has_value());
  EXPECT_FALSE(block->load_file(1, file.get(), 0, UINT64_MAX).has_value());
  EXPECT_FALSE(block->load_file(0, -1, 0, 1).has_value());
  EXPECT_EQ(block->host()[0], 0) << "nothing was loaded";
}

TEST(RamBlock, DiscardGivesPagesBackRoundedInwards) {
  for (const auto& [source, share] :
       {std::pair{RamSource::kAnonymous, false}, {RamSource::kAnonymous, true}, {RamSource::kMemfd, true}}) {
    const auto block = must_create({.size = 64 << 10, .source = source, .share = share});
    std::memset(block->host(), 0xaa, block->size());
    ASSERT_TRUE(block->discard(4097, 8192).has_value());
    for (std::uint64_t i = 0; i < block->size(); ++i) {
      ASSERT_EQ(block->host()[i], i >= 8192 && i < 12288 ? 0 : 0xaa) << i;
    }
    ASSERT_TRUE(block->discard(1, 4095).has_value()) << "less than a page";
    EXPECT_EQ(block->host()[1], 0xaa);
    EXPECT_FALSE(block->discard(0, (64 << 10) + 1).has_value());
    EXPECT_FALSE(block->discard(UINT64_MAX, 2).has_value());
    EXPECT_TRUE(block->discard(64 << 10, 0).has_value());
    ASSERT_TRUE(block->discard(0, block->size()).has_value());
    EXPECT_EQ(block->host()[0], 0);
  }
}

std::size_t mappings() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    ++count;
  }
  return count;
}

// A process has a limited number of mappings, and a guest chooses which pages its balloon takes.
TEST(RamBlock, ReleaseOfEverySecondPageOfAKernelSplitsNoMapping) {
  constexpr std::uint64_t kPages = 256;
  const UniqueFd file = pattern_file(kPages * kPageSize);
  const auto block = must_create({.size = kPages * kPageSize});
  ASSERT_TRUE(block->load_file(0, file.get(), 0, kPages * kPageSize).has_value());
  std::memset(block->host(), 0x55, block->size());
  const std::size_t before = mappings();
  for (std::uint64_t page = 0; page < kPages; page += 2) {
    ASSERT_TRUE(block->release(page * kPageSize, kPageSize).has_value());
  }
  EXPECT_LE(mappings(), before + 2);
  EXPECT_EQ(block->host()[5], pattern(5)) << "the file's byte";
  EXPECT_EQ(block->host()[kPageSize + 5], 0x55);
  ASSERT_TRUE(block->clear().has_value());
  EXPECT_EQ(block->host()[5], 0);
  EXPECT_EQ(block->host()[kPageSize + 5], 0);
}

TEST(RamBlock, DiscardOfAPrivateFileReadsAsZeroAndLeavesTheFile) {
  const TempDir dir;
  const std::string path = dir.file("template");
  std::ofstream(path) << std::string(8192, 'x');
  const auto block = must_create({.size = 8192, .source = RamSource::kFile, .path = path});
  ASSERT_TRUE(block->discard(0, 4096).has_value());
  EXPECT_EQ(block->host()[0], 0);
  EXPECT_EQ(block->host()[4096], 'x');
  std::ifstream in(path);
  EXPECT_EQ(in.get(), 'x');
}

}  // namespace
}  // namespace wisp
