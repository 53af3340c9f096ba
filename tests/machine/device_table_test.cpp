// The table of devices and the makers of devices agree, and what help prints is all there.
#include "machine/device_table.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "control/command_line.h"
#include "machine/device_factory.h"

namespace wisp {
namespace {

struct Table {
  const char* name;
  std::span<const DriverInfo> drivers;
};

std::vector<Table> tables() {
  const DriverTables all = driver_tables();
  return {{"-device", all.devices},
          {"-drive", all.drives},
          {"-netdev", all.netdevs},
          {"-chardev", all.chardevs},
          {"-object", all.objects}};
}

TEST(DeviceTable, EveryDriverHasAMakerOrIsAPartOfAnother) {
  const std::set<std::string_view> parts = {"virtconsole", "virtserialport", "isa-debug-exit", "pc-testdev"};
  std::size_t made = 0;
  for (const DriverInfo& driver : driver_tables().devices) {
    const DeviceConfig device{.driver = std::string(driver.name), .id = "x", .properties = {}};
    EXPECT_NE(DeviceFactory::is_virtio(device), parts.contains(driver.name)) << driver.name;
    made += DeviceFactory::is_virtio(device) ? 1U : 0U;
    if (driver.hotpluggable) {
      EXPECT_TRUE(DeviceFactory::is_virtio(device)) << driver.name << " takes no slot to be plugged into";
    }
  }
  EXPECT_EQ(made + parts.size(), driver_tables().devices.size());
  EXPECT_FALSE(DeviceFactory::is_virtio({.driver = "virtio-nothing-device", .id = {}, .properties = {}}));
  EXPECT_TRUE(DeviceFactory::debug_exit_options({}) == std::nullopt);
}

TEST(DeviceTable, NamesAreUniqueAndHelpIsWritten) {
  for (const Table& table : tables()) {
    ASSERT_FALSE(table.drivers.empty()) << table.name;
    std::set<std::string_view> names;
    for (const DriverInfo& driver : table.drivers) {
      const std::string where = std::string(table.name) + " " + std::string(driver.name);
      EXPECT_TRUE(names.insert(driver.name).second) << where << " is there twice";
      EXPECT_FALSE(driver.help.empty()) << where;
      std::set<std::string_view> options;
      for (const PropertySpec& property : driver.properties) {
        const std::string what = where + "," + std::string(property.name);
        EXPECT_FALSE(property.name.empty()) << where;
        EXPECT_NE(property.name, "id") << where << ": every driver has it, the table does not list it";
        EXPECT_TRUE(options.insert(property.name).second) << what << " is there twice";
        EXPECT_FALSE(property.help.empty()) << what;
        EXPECT_LE(property.minimum, property.maximum) << what;
        EXPECT_EQ(property.kind == PropertyKind::kEnum, !property.choices.empty()) << what;
        EXPECT_FALSE(property.required && !property.default_text.empty())
            << what << ": what must be given has no default";
      }
    }
  }
}

// A default that depends on something begins with a value: "on where the file system can".
TEST(DeviceTable, DefaultsThatAreValuesAreAccepted) {
  for (const Table& table : tables()) {
    for (const DriverInfo& driver : table.drivers) {
      for (const PropertySpec& property : driver.properties) {
        // Defaults of other kinds may be words ("no limit").
        if (property.kind != PropertyKind::kBool && property.kind != PropertyKind::kEnum) {
          continue;
        }
        if (!property.default_text.empty()) {
          const std::string_view value =
              property.default_text.substr(0, property.default_text.find_first_of(" ,"));
          EXPECT_TRUE(parse_property(property, value))
              << table.name << " " << driver.name << "," << property.name << "=" << property.default_text;
        }
      }
    }
  }
}

TEST(DeviceTable, TheDevicesPageIsUpToDate) {
  const std::string page = drivers_markdown(driver_tables());
  const std::string path = std::string(WISP_SOURCE_DIR) + "/docs/devices.md";
  if (std::getenv("WISP_UPDATE_DOCS") != nullptr) {
    std::ofstream(path) << page;
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == page)
      << "docs/devices.md differs from the table; run WISP_UPDATE_DOCS=1 test_machine";
}

TEST(DeviceTable, DebugExitTakesItsPortsFromTheConfiguration) {
  DeviceConfig device{.driver = "isa-debug-exit", .id = {}, .properties = {}};
  auto options = DeviceFactory::debug_exit_options({&device, 1});
  ASSERT_TRUE(options);
  EXPECT_EQ(options->iobase, 0x501);
  EXPECT_EQ(options->iosize, 2);
  device.properties.set("iobase", std::uint64_t{0xf4});
  device.properties.set("iosize", std::uint64_t{4});
  options = DeviceFactory::debug_exit_options({&device, 1});
  EXPECT_EQ(options->iobase, 0xf4);
  EXPECT_EQ(options->iosize, 4);
}

}  // namespace
}  // namespace wisp
