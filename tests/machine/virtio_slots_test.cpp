#include "machine/virtio_slots.h"

#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>

#include "base/bytes.h"
#include "support/fake_engine.h"

namespace wisp {
namespace {

// What the test knows of a device after it is gone.
struct Fate {
  std::atomic<int> resets = 0;
  std::atomic<bool> destroyed = false;
};

class PlainDevice final : public VirtioDevice {
 public:
  PlainDevice(EventLoop& loop, const GuestMemory& memory, Fate& fate)
      : VirtioDevice(loop, memory), fate_(fate) {}
  ~PlainDevice() override { fate_.destroyed = true; }
  [[nodiscard]] std::string_view name() const override { return "plain"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 4; }
  [[nodiscard]] std::uint64_t features() const override { return 0; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override {
    read_config_bytes({}, offset, data);
  }
  void write_config(std::uint64_t, std::span<const std::uint8_t>) override {}
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override {
    active_ = std::move(activation);
    return {};
  }
  void notify(std::uint16_t) override {}
  void reset() override {
    active_.reset();
    ++fate_.resets;
  }
  [[nodiscard]] const Queue* queue(std::uint16_t) const override { return nullptr; }
  [[nodiscard]] StateRecord save() const override { return {}; }
  [[nodiscard]] Result<void> load(const StateRecord&) override { return {}; }

 protected:
  void on_pause() override {}

 private:
  static constexpr std::array<std::uint16_t, 2> kSizes{16, 16};
  Fate& fate_;
  std::optional<VirtioActivation> active_;
};

class VirtioSlotsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    vm_ = *hypervisor_.create_vm({});
    ASSERT_TRUE(space_.add_listener(&vm_->memory_listener()));
    slots_ = std::make_unique<VirtioSlots>(*vm_, space_, log_, clock_);
  }
  void TearDown() override {
    slots_.reset();
    space_.remove_listener(&vm_->memory_listener());
  }

  Result<VirtioMmioSlot> attach(const std::string& id, std::optional<std::uint32_t> wanted = {}) {
    std::unique_ptr<VirtioDevice> device = std::make_unique<PlainDevice>(*loop_, memory_, fates_[id]);
    auto place = slots_->attach(id, device, wanted);
    EXPECT_EQ(device == nullptr, place.has_value()) << "it stays with the caller where it did not get in";
    return place;
  }
  std::uint32_t attach_index(const std::string& id) {
    const auto place = attach(id);
    EXPECT_TRUE(place) << place.error().message;
    return place ? place->index : ~0U;
  }
  std::map<Gpa, FlatRange> shown() { return hypervisor_.vm()->memory_listener().ranges(); }
  std::uint32_t read(Gpa address) {
    AddressSpace::Reader reader(space_);
    std::array<std::uint8_t, 4> data{};
    reader.read(address, data);
    return load_le<std::uint32_t>(data.data());
  }
  void write(Gpa address, std::uint32_t value) {
    AddressSpace::Reader reader(space_);
    std::array<std::uint8_t, 4> data{};
    store_le(data.data(), value);
    reader.write(address, data);
  }

  Log log_{-1};
  SystemClock clock_;
  std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  GuestMemory memory_;
  std::map<std::string, Fate> fates_;
  FakeHypervisor hypervisor_;
  std::unique_ptr<Vm> vm_;
  AddressSpace space_{"memory", 0};
  std::unique_ptr<VirtioSlots> slots_;
};

constexpr std::uint32_t kMagic = 0x74726976;

TEST_F(VirtioSlotsTest, SixtyFourFitAndTheNextIsRefused) {
  std::set<Gpa> places;
  std::map<std::uint32_t, int> users;
  for (std::uint32_t i = 0; i < 64; ++i) {
    const auto place = attach("d" + std::to_string(i));
    ASSERT_TRUE(place) << place.error().message;
    EXPECT_EQ(place->index, i);
    places.insert(place->base);
    ++users[place->gsi];
    EXPECT_EQ(read(place->base), kMagic);
  }
  EXPECT_EQ(places.size(), 64U);
  EXPECT_EQ(slots_->present(), UINT64_MAX);
  // Shared evenly, and with nobody else.
  EXPECT_EQ(users.size(), layout::kVirtioGsis.size());
  for (const auto& [gsi, count] : users) {
    EXPECT_GE(count, 4) << gsi;
    EXPECT_LE(count, 5) << gsi;
    EXPECT_NE(gsi, layout::kGedGsi);
    EXPECT_NE(gsi, layout::kSerialGsi);
    EXPECT_NE(gsi, layout::kRtcGsi);
  }
  EXPECT_EQ(hypervisor_.vm()->irqs().lines(), 64U);

  const auto one_more = attach("late");
  ASSERT_FALSE(one_more);
  EXPECT_EQ(one_more.error().message, "all 64 device slots of the machine are taken");
  EXPECT_TRUE(fates_["late"].destroyed);
  EXPECT_EQ(hypervisor_.vm()->irqs().lines(), 64U) << "its interrupt line is gone too";
}

TEST_F(VirtioSlotsTest, WithoutAcpiOnlyThePinsOfOldInterruptControllersAreUsed) {
  slots_ = std::make_unique<VirtioSlots>(*vm_, space_, log_, clock_, false);
  std::set<std::uint32_t> gsis;
  for (std::uint32_t i = 0; i < 64; ++i) {
    const auto place = attach("d" + std::to_string(i));
    ASSERT_TRUE(place) << place.error().message;
    EXPECT_LT(place->gsi, 16U) << i;
    gsis.insert(place->gsi);
    EXPECT_EQ(slots_->find("d" + std::to_string(i))->place, *place);
  }
  EXPECT_EQ(gsis.size(), layout::kVirtioLegacyGsis);
}

TEST_F(VirtioSlotsTest, AWantedSlotIsGivenOrRefusedByName) {
  EXPECT_EQ(attach("a", 63)->index, 63U);
  EXPECT_EQ(attach("b", 63).error().message, "slot 63 is taken by device 'a'");
  EXPECT_EQ(attach("b", 64).error().message, "slot 64 does not exist, expected 0 to 63");
  EXPECT_EQ(attach("a", 5).error().message, "there is a device 'a' already");
  EXPECT_EQ(attach_index("b"), 0U);
  EXPECT_EQ(slots_->present(), 1ULL << 63 | 1);
}

TEST_F(VirtioSlotsTest, AFreedSlotIsGivenOutLastUntilTheMachineIsReset) {
  EXPECT_EQ(attach_index("a"), 0U);
  EXPECT_EQ(attach_index("b"), 1U);
  ASSERT_TRUE(slots_->detach("a"));
  EXPECT_EQ(attach_index("c"), 2U) << "the guest may hold on to what it saw in slot 0";
  slots_->reset();
  EXPECT_EQ(attach_index("d"), 0U);
  ASSERT_TRUE(slots_->detach("d"));
  for (std::uint32_t i = 3; i < 64; ++i) {
    EXPECT_EQ(attach_index("n" + std::to_string(i)), i);
  }
  EXPECT_EQ(attach_index("last"), 0U) << "no never-used slot is left";
  EXPECT_FALSE(attach("too many"));
}

TEST_F(VirtioSlotsTest, DetachTakesDoorbellsAndInterruptLineAway) {
  const auto a = *attach("a");
  const auto b = *attach("b");
  ASSERT_EQ(shown().count(a.base), 1U);
  const std::vector<IoEvent> doorbells = shown().at(a.base).events;
  ASSERT_EQ(doorbells.size(), 2U) << "one for each queue";
  for (const IoEvent& bell : doorbells) {
    EXPECT_EQ(bell.offset, virtio_mmio::kQueueNotify);
    EXPECT_EQ(bell.size, 4U);
  }
  write(a.base + virtio_mmio::kStatus, kVirtioStatusAcknowledge);

  auto detached = slots_->detach("a");
  ASSERT_TRUE(detached);
  EXPECT_EQ(shown().count(a.base), 0U);
  EXPECT_EQ(read(a.base), 0xffff'ffffU);
  EXPECT_GE(fates_["a"].resets.load(), 1);
  EXPECT_FALSE(fates_["a"].destroyed);
  EXPECT_EQ(detached->use_count(), 1) << "what is given is all that is left";
  detached->reset();
  EXPECT_TRUE(fates_["a"].destroyed);
  EXPECT_EQ(hypervisor_.vm()->irqs().lines(), 1U);
  EXPECT_EQ(read(b.base), kMagic);
  EXPECT_FALSE(slots_->find("a"));
  EXPECT_EQ(slots_->detach("a").error().message, "no device 'a'");
}

TEST_F(VirtioSlotsTest, ResetPutsEveryTransportBack) {
  const auto a = *attach("a");
  const auto b = *attach("b", 40);
  write(a.base + virtio_mmio::kStatus, kVirtioStatusAcknowledge);
  write(b.base + virtio_mmio::kStatus, kVirtioStatusAcknowledge | kVirtioStatusDriver);
  EXPECT_EQ(read(b.base + virtio_mmio::kStatus), kVirtioStatusAcknowledge | kVirtioStatusDriver);
  slots_->reset();
  EXPECT_EQ(read(a.base + virtio_mmio::kStatus), 0U);
  EXPECT_EQ(read(b.base + virtio_mmio::kStatus), 0U);
  ASSERT_EQ(slots_->occupied().size(), 2U);
  EXPECT_EQ(slots_->occupied()[0].id, "a");
  EXPECT_EQ(slots_->occupied()[1].place, b);
}

TEST_F(VirtioSlotsTest, AnEngineThatRefusesLeavesTheSlotFree) {
  hypervisor_.vm()->memory_listener().refuse(1);
  EXPECT_FALSE(attach("a"));
  EXPECT_TRUE(fates_["a"].destroyed);
  EXPECT_EQ(slots_->present(), 0U);
  EXPECT_EQ(hypervisor_.vm()->irqs().lines(), 0U);
  EXPECT_EQ(attach_index("b"), 0U);
}

TEST_F(VirtioSlotsTest, AccessesByVcpusAndHotplugAtTheSameTime) {
  const Gpa base = virtio_slot(7).base;
  std::atomic<bool> stop = false;
  std::thread vcpu([&] {
    AddressSpace::Reader reader(space_);
    std::array<std::uint8_t, 4> data{};
    while (!stop) {
      reader.read(base, data);
      const auto value = load_le<std::uint32_t>(data.data());
      EXPECT_TRUE(value == kMagic || value == 0xffff'ffffU) << value;
      reader.write(base + virtio_mmio::kStatus, data);
    }
  });
  for (int i = 0; i < 300; ++i) {
    ASSERT_TRUE(attach("d", 7));
    // The reader may still be inside: then a later change of the space destroys it.
    ASSERT_TRUE(slots_->detach("d"));
  }
  stop = true;
  vcpu.join();
  EXPECT_TRUE(space_.quiescent());
}

}  // namespace
}  // namespace wisp
