#include "block/drive.h"

#include <gtest/gtest.h>

#include "block/support/block_kit.h"

namespace wisp {
namespace {

using test::BackendDriver;
using test::TempDir;

// As the command line does it: each text is parsed by its spec.
Result<DriveConfig> parse(const std::vector<std::pair<std::string, std::string>>& options) {
  PropertySet set;
  for (const auto& [name, text] : options) {
    const PropertySpec* const spec = find_property(drive_properties(), name);
    if (spec == nullptr) {
      return fail("no option {}", name);
    }
    WISP_ASSIGN(PropertyValue value, parse_property(*spec, text));
    set.set(name, std::move(value));
  }
  return drive_config("disk0", set);
}

std::string error(const std::vector<std::pair<std::string, std::string>>& options) {
  const auto config = parse(options);
  return config ? std::string("no error") : config.error().message;
}

TEST(Drive, TakesTheOptionsOfStratoVirt) {
  const auto config = parse({{"file", "a.img"},
                             {"readonly", "on"},
                             {"direct", "off"},
                             {"aio", "threads"},
                             {"discard", "unmap"},
                             {"format", "raw"},
                             {"if", "none"},
                             {"media", "disk"},
                             {"throttling.iops-total", "100"},
                             {"throttling.bps-total", "10M"}});
  ASSERT_TRUE(config.has_value()) << config.error().message;
  EXPECT_EQ(config->id, "disk0");
  EXPECT_EQ(config->file, "a.img");
  EXPECT_TRUE(config->read_only);
  EXPECT_EQ(config->direct, false);
  EXPECT_EQ(config->aio, AioKind::kThreads);
  EXPECT_TRUE(config->discard);
  EXPECT_EQ(config->limits.iops, 100U);
  EXPECT_EQ(config->limits.bps, 10U << 20);
}

TEST(Drive, Defaults) {
  const auto config = parse({{"file", "a.img"}});
  ASSERT_TRUE(config.has_value());
  EXPECT_FALSE(config->read_only);
  EXPECT_FALSE(config->direct.has_value());
  EXPECT_FALSE(config->aio.has_value());
  EXPECT_FALSE(config->discard);
  EXPECT_FALSE(config->limits.any());
  EXPECT_TRUE(parse({{"file", "a.iso"}, {"media", "cdrom"}})->read_only);
  EXPECT_EQ(parse({{"file", "a"}, {"aio", "native"}})->aio, AioKind::kIoUring);
  EXPECT_EQ(parse({{"file", "a"}, {"aio", "off"}})->aio, AioKind::kOff);
}

TEST(Drive, RefusesWhatIsNotThere) {
  EXPECT_EQ(error({}), "drive disk0: file= is missing; give the path of a disk image or block device");
  EXPECT_EQ(error({{"file", "a"}, {"format", "qcow2"}}), "'qcow2' is not one of raw");
  EXPECT_EQ(error({{"file", "a"}, {"if", "pflash"}}), "'pflash' is not one of none");
  EXPECT_EQ(error({{"file", "a"}, {"throttling.iops-total-max", "5"}}),
            "drive disk0: a throttling.*-total-max needs its throttling.*-total; give both");
  EXPECT_EQ(error({{"file", "a"}, {"throttling.iops-total", "1000001"}}),
            "'1000001' is out of range, expected 0 to 1000000");
  EXPECT_EQ(error({{"file", "a"}, {"aio", "posix"}}), "'posix' is not one of io_uring|native|threads|off");
}

TEST(Drive, OpensAndNamesDriveAndFileInErrors) {
  const TempDir dir;
  Log log;
  const SystemClock clock;
  const std::string file = dir.file("disk", 1 << 20);
  const auto backend = open_drive({.id = "d", .file = file, .limits = {.iops = 1000}}, log, clock);
  ASSERT_TRUE(backend.has_value()) << backend.error().message;
  EXPECT_EQ((*backend)->geometry().size, 1U << 20);
  EXPECT_EQ((*backend)->identity().file, file);
  EXPECT_EQ((*backend)->identity().format, "raw");
  EXPECT_NE((*backend)->identity().inode, 0U);
  const auto again = open_drive({.id = "e", .file = file}, log, clock);
  ASSERT_FALSE(again.has_value());
  EXPECT_EQ(again.error().message,
            "drive e: file '" + file +
                "' is in use for writing by another process or drive; end that one, or use a copy");
}

TEST(Drive, EveryAioKindReadsTheFile) {
  const TempDir dir;
  Log log;
  const SystemClock clock;
  const std::string file = dir.file("disk", 8192);
  for (const auto& [aio, name] : {std::pair{AioKind::kIoUring, "io_uring"},
                                  std::pair{AioKind::kThreads, "threads"}, std::pair{AioKind::kOff, "off"}}) {
    const auto backend = open_drive({.id = "d", .file = file, .aio = aio}, log, clock);
    ASSERT_TRUE(backend.has_value()) << backend.error().message;
    if (aio != AioKind::kIoUring || (*backend)->identity().aio != "threads") {
      EXPECT_EQ((*backend)->identity().aio, name);
    }
    std::vector<std::uint8_t> data(4096);
    const iovec buffer{data.data(), data.size()};
    BackendDriver driver(**backend);
    EXPECT_EQ(driver.transfer(BlockOp::kRead, 4096, {&buffer, 1}), 0);
    const auto expected = TempDir::pattern(8192, 1);
    EXPECT_TRUE(std::equal(data.begin(), data.end(), expected.begin() + 4096));
  }
}

TEST(Drive, ClosingReleasesTheFileAtOnce) {
  const TempDir dir;
  Log log;
  const SystemClock clock;
  const std::string file = dir.file("disk", 8192);
  for (int i = 0; i < 100; ++i) {
    const auto backend = open_drive({.id = "d", .file = file}, log, clock);
    ASSERT_TRUE(backend.has_value()) << i << ": " << backend.error().message;
    std::vector<std::uint8_t> data(4096);
    const iovec buffer{data.data(), data.size()};
    BackendDriver driver(**backend);
    EXPECT_EQ(driver.transfer(BlockOp::kWrite, 4096, {&buffer, 1}), 0);
  }
}

}  // namespace
}  // namespace wisp
