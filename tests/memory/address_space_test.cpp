#include "memory/address_space.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <thread>

#include "base/unique_fd.h"
#include "memory/recording_parts.h"

namespace wisp {
namespace {

MemoryRegionPtr io(const std::string& name, std::uint64_t size, std::vector<IoEvent> events = {}) {
  return MemoryRegion::io(name, std::make_shared<RecordingHandler>(), size, std::move(events));
}

std::string error_of(const Result<void>& result) {
  return result.has_value() ? "" : result.error().message;
}

TEST(AddressSpace, AnEmptySpaceReadsAsOnes) {
  AddressSpace space("ports", 0x10000);
  EXPECT_EQ(text_of(space.snapshot()), "");
  AddressSpace::Reader reader(space);
  std::array<std::uint8_t, 4> data{};
  reader.read(0x80, data);
  EXPECT_EQ(data, (std::array<std::uint8_t, 4>{0xff, 0xff, 0xff, 0xff}));
  reader.write(0x80, data);
}

TEST(AddressSpace, HigherPriorityWinsAndLaterWinsAmongEquals) {
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add(io("low", 0x100), 0));
  ASSERT_TRUE(space.add(io("high", 0x20), 0x40, 1));
  EXPECT_EQ(text_of(space.snapshot()), "0-3f low@0\n40-5f high@0\n60-ff low@60\n");
  ASSERT_TRUE(space.add(io("equal", 0x20), 0xf0));
  EXPECT_EQ(text_of(space.snapshot()), "0-3f low@0\n40-5f high@0\n60-ef low@60\nf0-10f equal@0\n");
  ASSERT_TRUE(space.add(io("below", 0x1000), 0, -1));
  EXPECT_EQ(text_of(space.snapshot()),
            "0-3f low@0\n40-5f high@0\n60-ef low@60\nf0-10f equal@0\n110-fff below@110\n");
}

TEST(AddressSpace, AChildOfAContainerIsClippedByIt) {
  AddressSpace space("memory", 0);
  const auto inner = MemoryRegion::container("inner", 0x100);
  ASSERT_TRUE(space.add(inner, 0x1000));
  AddressSpace::Change change{.region = io("a", 0x10), .parent = inner, .offset = 0xf0};
  ASSERT_TRUE(space.commit({&change, 1}));
  EXPECT_EQ(text_of(space.snapshot()), "10f0-10ff a@0\n");
  change = {.region = io("b", 0x10), .parent = inner, .offset = 0xf1};
  EXPECT_NE(error_of(space.commit({&change, 1})).find("does not fit"), std::string::npos);
  EXPECT_EQ(text_of(space.snapshot()), "10f0-10ff a@0\n");
}

TEST(AddressSpace, PriorityCountsAmongSiblingsOnly) {
  AddressSpace space("memory", 0);
  const auto inner = MemoryRegion::container("inner", 0x100);
  const std::array changes{
      AddressSpace::Change{.region = inner, .offset = 0, .priority = 0},
      AddressSpace::Change{.region = io("loud", 0x100), .parent = inner, .offset = 0, .priority = 1000},
      AddressSpace::Change{.region = io("top", 0x10), .offset = 0x20, .priority = 1}};
  ASSERT_TRUE(space.commit(changes));
  EXPECT_EQ(text_of(space.snapshot()), "0-1f loud@0\n20-2f top@0\n30-ff loud@30\n");
}

TEST(AddressSpace, AliasShowsAPartOfItsTargetAndSoDoesAnAliasOfIt) {
  std::vector<std::uint8_t> host(0x4000);
  AddressSpace space("memory", 0);
  const auto ram = MemoryRegion::ram("ram", host.data(), host.size());
  const auto one = MemoryRegion::alias("one", ram, 0x1000, 0x2000);
  const auto two = MemoryRegion::alias("two", one, 0x800, 0x1000);
  ASSERT_TRUE(space.add(one, 0x10000));
  ASSERT_TRUE(space.add(two, 0x100000));
  EXPECT_EQ(text_of(space.snapshot()), "10000-11fff ram@1000\n100000-100fff ram@1800\n");
  EXPECT_EQ(space.snapshot().ranges()[1].host, host.data() + 0x1800);
}

TEST(AddressSpace, RamAroundAHoleIsTwoRangesAndOneAgainWithoutIt) {
  std::vector<std::uint8_t> host(0x3000);
  AddressSpace space("memory", 0);
  const auto ram = MemoryRegion::ram("ram", host.data(), host.size());
  const auto device = io("device", 0x1000);
  ASSERT_TRUE(space.add(ram, 0));
  ASSERT_TRUE(space.add(device, 0x1000, 1));
  EXPECT_EQ(text_of(space.snapshot()), "0-fff ram@0\n1000-1fff device@0\n2000-2fff ram@2000\n");
  ASSERT_TRUE(space.remove(device));
  EXPECT_EQ(text_of(space.snapshot()), "0-2fff ram@0\n");
}

TEST(AddressSpace, AdjacentAliasesOfOneRegionAreOneRangeOnlyWhereTheHostMemoryIs) {
  std::vector<std::uint8_t> host(0x4000);
  const auto ram = MemoryRegion::ram("ram", host.data(), host.size());
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add(MemoryRegion::alias("a", ram, 0, 0x1000), 0));
  ASSERT_TRUE(space.add(MemoryRegion::alias("b", ram, 0x1000, 0x1000), 0x1000));
  ASSERT_TRUE(space.add(MemoryRegion::alias("c", ram, 0x3000, 0x1000), 0x2000));
  EXPECT_EQ(text_of(space.snapshot()), "0-1fff ram@0\n2000-2fff ram@3000\n");
}

TEST(AddressSpace, RangesAtTheEndOfTheAddressSpace) {
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add(io("top", 0x1000), UINT64_MAX - 0xfff));
  EXPECT_EQ(text_of(space.snapshot()), "fffffffffffff000-ffffffffffffffff top@0\n");
  EXPECT_NE(error_of(space.add(io("over", 0x1000), UINT64_MAX - 0xffe)), "");
  EXPECT_NE(error_of(space.add(io("wrap", UINT64_MAX), 2)), "");
  ASSERT_TRUE(space.add(io("all", UINT64_MAX), 0, -1));
  EXPECT_EQ(text_of(space.snapshot()), "0-ffffffffffffefff all@0\nfffffffffffff000-ffffffffffffffff top@0\n");
  ASSERT_NE(space.snapshot().find(UINT64_MAX), nullptr);
  EXPECT_EQ(space.snapshot().find(UINT64_MAX)->name, "top");
}

TEST(AddressSpace, TheEndOfABoundedSpaceIsItsSize) {
  AddressSpace ports("ports", 0x10000);
  EXPECT_TRUE(ports.add(io("last", 1), 0xffff));
  EXPECT_FALSE(ports.add(io("beyond", 1), 0x10000));
  EXPECT_FALSE(ports.add(io("across", 2), 0xffff));
}

TEST(AddressSpace, MistakesAreRefusedAndChangeNothing) {
  AddressSpace space("memory", 0x100000);
  AddressSpace other("other", 0x100000);
  const auto a = io("a", 0x10);
  const auto box = MemoryRegion::container("box", 0x100);
  ASSERT_TRUE(space.add(a, 0));
  ASSERT_TRUE(other.add(box, 0));
  const std::string before = text_of(space.snapshot());
  EXPECT_NE(error_of(space.add(a, 0x100)).find("in use"), std::string::npos);
  EXPECT_NE(error_of(other.add(a, 0x1000)).find("in use"), std::string::npos);
  EXPECT_NE(error_of(space.remove(io("never", 1))).find("not there"), std::string::npos);
  EXPECT_NE(error_of(other.remove(a)).find("not there"), std::string::npos) << "of another space";
  EXPECT_NE(error_of(space.add(io("none", 0), 0)), "");
  const AddressSpace::Change into_io{.region = io("b", 1), .parent = a};
  EXPECT_NE(error_of(space.commit({&into_io, 1})).find("no container"), std::string::npos);
  const AddressSpace::Change into_foreign{.region = io("b", 1), .parent = box};
  EXPECT_NE(error_of(space.commit({&into_foreign, 1})).find("no container"), std::string::npos);
  const auto self = MemoryRegion::container("self", 0x100);
  const AddressSpace::Change into_self{.region = self, .parent = self};
  EXPECT_NE(error_of(space.commit({&into_self, 1})), "");
  EXPECT_NE(error_of(space.add(MemoryRegion::alias("long", a, 1, 0x10), 0x100)).find("shows"),
            std::string::npos);
  EXPECT_NE(error_of(space.add(MemoryRegion::alias("wraps", a, UINT64_MAX, 0x10), 0x100)), "");
  EXPECT_EQ(text_of(space.snapshot()), before);
  EXPECT_TRUE(space.remove(a));
  EXPECT_TRUE(other.add(a, 0x1000)) << "free again after the removal";
}

TEST(AddressSpace, LoopsOfAliasesAreRefused) {
  AddressSpace space("memory", 0);
  const auto box = MemoryRegion::container("box", 0x1000);
  ASSERT_TRUE(space.add(box, 0));
  const AddressSpace::Change direct{
      .region = MemoryRegion::alias("mirror", box, 0, 0x100), .parent = box, .offset = 0x100};
  EXPECT_NE(error_of(space.commit({&direct, 1})).find("contain itself"), std::string::npos);
  // Through a second container that is not in the tree yet.
  const auto far = MemoryRegion::container("far", 0x1000);
  const AddressSpace::Change there{.region = MemoryRegion::alias("to-box", box, 0, 0x100), .parent = far};
  ASSERT_TRUE(space.commit({&there, 1}));
  const AddressSpace::Change back{.region = MemoryRegion::alias("to-far", far, 0, 0x100), .parent = box};
  EXPECT_NE(error_of(space.commit({&back, 1})).find("contain itself"), std::string::npos);
  EXPECT_EQ(text_of(space.snapshot()), "");
}

TEST(AddressSpace, AliasesThatDoubleAtEachLevelAreBounded) {
  AddressSpace space("memory", 0);
  MemoryRegionPtr level = io("leaf", 1);
  std::uint64_t size = 1;
  for (int depth = 0; depth < 30; ++depth) {
    const auto box = MemoryRegion::container("box", size * 2);
    const std::array changes{
        AddressSpace::Change{.region = MemoryRegion::alias("l", level, 0, size), .parent = box, .offset = 0},
        AddressSpace::Change{
            .region = MemoryRegion::alias("r", level, 0, size), .parent = box, .offset = size}};
    ASSERT_TRUE(space.commit(changes));
    level = box;
    size *= 2;
  }
  EXPECT_NE(error_of(space.add(level, 0)), "");
  EXPECT_EQ(text_of(space.snapshot()), "");
}

TEST(AddressSpace, DeepNestingIsBounded) {
  AddressSpace space("memory", 0);
  MemoryRegionPtr chain = io("leaf", 1);
  for (int depth = 0; depth < 1000; ++depth) {
    chain = MemoryRegion::alias("link", chain, 0, 1);
  }
  EXPECT_NE(error_of(space.add(chain, 0)).find("levels deep"), std::string::npos);
}

TEST(AddressSpace, ACommitOfSeveralChangesIsAllOrNothing) {
  AddressSpace space("memory", 0);
  const auto a = io("a", 0x10);
  ASSERT_TRUE(space.add(a, 0));
  const auto b = io("b", 0x10);
  std::array changes{AddressSpace::Change{.region = a, .add = false},
                     AddressSpace::Change{.region = b, .offset = 0x100},
                     AddressSpace::Change{.region = b, .offset = 0x200}};
  EXPECT_FALSE(space.commit(changes));
  EXPECT_EQ(text_of(space.snapshot()), "0-f a@0\n");
  changes[2] = {.region = a, .offset = 0x200};
  ASSERT_TRUE(space.commit(changes)) << "a was removed and can be added elsewhere in the same commit";
  EXPECT_EQ(text_of(space.snapshot()), "100-10f b@0\n200-20f a@0\n");
}

TEST(AddressSpace, ListenersAreToldOfDifferencesOnlyRemovalsFirst) {
  AddressSpace space("memory", 0);
  std::vector<std::uint8_t> host(0x3000);
  ASSERT_TRUE(space.add(MemoryRegion::ram("ram", host.data(), host.size()), 0));
  ASSERT_TRUE(space.add(io("far", 0x10), 0x10000));
  RecordingListener listener;
  ASSERT_TRUE(space.add_listener(&listener));
  EXPECT_EQ(listener.take(), "+0-2fff ram@0\n+10000-1000f far@0\n");
  const auto hole = io("hole", 0x1000);
  ASSERT_TRUE(space.add(hole, 0x1000, 1));
  EXPECT_EQ(listener.take(), "-0-2fff ram@0\n+0-fff ram@0\n+1000-1fff hole@0\n+2000-2fff ram@2000\n");
  ASSERT_TRUE(space.add(io("hidden", 0x800), 0x1000));
  EXPECT_EQ(listener.take(), "") << "nothing of it can be seen";
  space.remove_listener(&listener);
  ASSERT_TRUE(space.remove(hole));
  EXPECT_EQ(listener.take(), "");
}

TEST(AddressSpace, AListenerThatRefusesUndoesTheCommit) {
  AddressSpace space("memory", 0);
  const auto first = io("first", 0x1000);
  ASSERT_TRUE(space.add(first, 0));
  RecordingListener good;
  RecordingListener bad;
  ASSERT_TRUE(space.add_listener(&good));
  ASSERT_TRUE(space.add_listener(&bad));
  bad.refuse = "b";
  const std::array changes{AddressSpace::Change{.region = first, .add = false},
                           AddressSpace::Change{.region = io("a", 0x10), .offset = 0x100},
                           AddressSpace::Change{.region = io("b", 0x10), .offset = 0x200}};
  const std::string error = error_of(space.commit(changes));
  EXPECT_NE(error.find("region b at 0x200"), std::string::npos) << error;
  EXPECT_EQ(text_of(space.snapshot()), "0-fff first@0\n");
  EXPECT_EQ(good.present(), "0-fff first@0\n") << "told back to what it was";
  EXPECT_EQ(bad.present(), "0-fff first@0\n");
  EXPECT_TRUE(space.remove(first)) << "the tree knows it again";
  EXPECT_EQ(good.present(), "");
}

TEST(AddressSpace, AListenerThatRefusesWhatIsThereIsNotAdded) {
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add(io("a", 0x10), 0));
  ASSERT_TRUE(space.add(io("b", 0x10), 0x100));
  RecordingListener listener;
  listener.refuse = "b";
  EXPECT_NE(error_of(space.add_listener(&listener)), "");
  EXPECT_EQ(listener.present(), "");
  EXPECT_EQ(listener.take(), "+0-f a@0\n-0-f a@0\n");
  ASSERT_TRUE(space.add(io("c", 0x10), 0x200));
  EXPECT_EQ(listener.take(), "");
}

TEST(AddressSpaceReader, AccessesGoToTheRightPlaceInTheRegion) {
  AddressSpace space("memory", 0);
  const auto handler = std::make_shared<RecordingHandler>();
  const auto region = MemoryRegion::io("device", handler, 0x100);
  ASSERT_TRUE(space.add(MemoryRegion::alias("part", region, 0x40, 0x20), 0x1000));
  AddressSpace::Reader reader(space);
  const std::array<std::uint8_t, 4> data{1, 2, 3, 4};
  reader.write(0x1004, data);
  EXPECT_EQ(handler->take(), "w44:01020304\n");
  std::array<std::uint8_t, 2> in{};
  reader.read(0x101e, in);
  EXPECT_EQ(handler->take(), "r5e+2\n");
}

TEST(AddressSpaceReader, AnAccessIsSplitAtEveryEdge) {
  std::vector<std::uint8_t> host(0x1000);
  std::iota(host.begin(), host.end(), std::uint8_t{0});
  AddressSpace space("memory", 0);
  const auto handler = std::make_shared<RecordingHandler>();
  ASSERT_TRUE(space.add(MemoryRegion::ram("ram", host.data(), host.size()), 0));
  ASSERT_TRUE(space.add(MemoryRegion::io("device", handler, 2), 0x1000));
  ASSERT_TRUE(space.add(MemoryRegion::rom("rom", host.data(), 0x1000), 0x1004));
  AddressSpace::Reader reader(space);
  std::array<std::uint8_t, 8> data{};
  reader.read(0xffe, data);
  EXPECT_EQ(data, (std::array<std::uint8_t, 8>{0xfe, 0xff, 0, 0, 0xff, 0xff, 0, 1}));
  EXPECT_EQ(handler->take(), "r0+2\n");
  reader.write(0xffe, std::array<std::uint8_t, 8>{1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(handler->take(), "w0:0304\n");
  EXPECT_EQ(host[0xffe], 1);
  EXPECT_EQ(host[0xfff], 2);
  EXPECT_EQ(host[0], 0) << "ROM drops writes";
}

TEST(AddressSpaceReader, LongAccessesReachHandlersInPiecesOfEight) {
  AddressSpace space("memory", 0);
  const auto handler = std::make_shared<RecordingHandler>();
  ASSERT_TRUE(space.add(MemoryRegion::io("device", handler, 0x100), 0));
  AddressSpace::Reader reader(space);
  std::array<std::uint8_t, 19> data{};
  reader.read(3, data);
  EXPECT_EQ(handler->take(), "r3+8\nrb+8\nr13+3\n");
  reader.read(3, {});
  reader.write(3, {});
  EXPECT_EQ(handler->take(), "");
}

TEST(AddressSpaceReader, NothingWrapsAtTheEndOfTheSpace) {
  AddressSpace space("memory", 0);
  const auto top = std::make_shared<RecordingHandler>();
  const auto bottom = std::make_shared<RecordingHandler>();
  ASSERT_TRUE(space.add(MemoryRegion::io("top", top, 0x1000), UINT64_MAX - 0xfff));
  ASSERT_TRUE(space.add(MemoryRegion::io("bottom", bottom, 0x1000), 0));
  AddressSpace::Reader reader(space);
  std::array<std::uint8_t, 8> data{};
  reader.read(UINT64_MAX - 2, data);
  EXPECT_EQ(top->take(), "rffd+3\n");
  EXPECT_EQ(bottom->take(), "");
  EXPECT_EQ(data[7], 0xff);
  reader.write(UINT64_MAX, data);
  EXPECT_EQ(top->take().substr(0, 5), "wfff:");
  EXPECT_EQ(bottom->take(), "");
  AddressSpace small("ports", 0x10000);
  const auto last = std::make_shared<RecordingHandler>();
  ASSERT_TRUE(small.add(MemoryRegion::io("last", last, 1), 0xffff));
  AddressSpace::Reader ports(small);
  ports.read(0xffff, data);
  EXPECT_EQ(last->take(), "r0+1\n");
}

TEST(AddressSpaceReader, AWriteThatMatchesADoorbellSignalsItInPlaceOfTheHandler) {
  const UniqueFd any = *make_eventfd();
  const UniqueFd sized = *make_eventfd();
  const UniqueFd valued = *make_eventfd();
  AddressSpace space("memory", 0);
  const auto handler = std::make_shared<RecordingHandler>();
  const auto region = MemoryRegion::io("device", handler, 0x100,
                                       {{.offset = 0x10, .size = 0, .value = {}, .fd = any.get()},
                                        {.offset = 0x20, .size = 2, .value = {}, .fd = sized.get()},
                                        {.offset = 0x30, .size = 4, .value = 7, .fd = valued.get()}});
  ASSERT_TRUE(space.add(MemoryRegion::alias("part", region, 0x10, 0x40), 0x1000));
  AddressSpace::Reader reader(space);
  reader.write(0x1000, std::array<std::uint8_t, 1>{1});
  reader.write(0x1000, std::array<std::uint8_t, 8>{1});
  EXPECT_EQ(drain_eventfd(any.get()), 2U);
  EXPECT_EQ(handler->take(), "");
  reader.write(0x1010, std::array<std::uint8_t, 2>{1, 0});
  EXPECT_EQ(drain_eventfd(sized.get()), 1U);
  EXPECT_EQ(handler->take(), "");
  reader.write(0x1010, std::array<std::uint8_t, 4>{1});
  EXPECT_EQ(handler->take(), "w20:01000000\n") << "another size";
  reader.write(0x1020, std::array<std::uint8_t, 4>{7});
  EXPECT_EQ(drain_eventfd(valued.get()), 1U);
  reader.write(0x1020, std::array<std::uint8_t, 4>{8});
  EXPECT_EQ(handler->take(), "w30:08000000\n") << "another value";
  reader.write(0x1011, std::array<std::uint8_t, 2>{1, 0});
  EXPECT_EQ(handler->take(), "w21:0100\n") << "another offset";
  EXPECT_EQ(drain_eventfd(sized.get()) + drain_eventfd(valued.get()), 0U);
  std::array<std::uint8_t, 2> data{};
  reader.read(0x1010, data);
  EXPECT_EQ(handler->take(), "r20+2\n") << "reads are never doorbells";
}

TEST(AddressSpace, DoorbellsAreListedWithTheRangeThatHoldsThemWhole) {
  AddressSpace space("memory", 0);
  const auto region = io("device", 0x100,
                         {{.offset = 0x10, .size = 4, .value = {}, .fd = 1},
                          {.offset = 0x3e, .size = 4, .value = {}, .fd = 2},
                          {.offset = 0x80, .size = 4, .value = {}, .fd = 3}});
  ASSERT_TRUE(space.add(region, 0));
  ASSERT_TRUE(space.add(io("cover", 0x20), 0x40, 1));
  const FlatView view = space.snapshot();
  ASSERT_EQ(view.ranges().size(), 3U);
  ASSERT_EQ(view.ranges()[0].events.size(), 1U);
  EXPECT_EQ(view.ranges()[0].events[0].offset, 0x10U);
  ASSERT_EQ(view.ranges()[2].events.size(), 1U);
  EXPECT_EQ(view.ranges()[2].events[0].offset, 0x20U) << "counts from the start of the range";
}

// Adds and removes regions from within its own register access.
class CommittingHandler final : public IoHandler {
 public:
  CommittingHandler(AddressSpace& space, MemoryRegionPtr other) : space_(space), other_(std::move(other)) {}
  void io_read(std::uint64_t, std::span<std::uint8_t> data) override {
    std::ranges::fill(data, std::uint8_t{0});
  }
  void io_write(std::uint64_t, std::span<const std::uint8_t> data) override {
    const auto result = data[0] != 0 ? space_.add(other_, 0x1000) : space_.remove(other_);
    EXPECT_TRUE(result.has_value());
    EXPECT_FALSE(space_.quiescent()) << "this very access holds the earlier view";
  }

 private:
  AddressSpace& space_;
  MemoryRegionPtr other_;
};

TEST(AddressSpaceReader, AHandlerMayChangeTheSpaceItIsIn) {
  AddressSpace space("memory", 0);
  const auto other = io("other", 0x10);
  ASSERT_TRUE(space.add(MemoryRegion::io("bar", std::make_shared<CommittingHandler>(space, other), 0x10), 0));
  AddressSpace::Reader reader(space);
  reader.write(0, std::array<std::uint8_t, 1>{1});
  EXPECT_EQ(text_of(space.snapshot()), "0-f bar@0\n1000-100f other@0\n");
  reader.write(0, std::array<std::uint8_t, 1>{0});
  EXPECT_EQ(text_of(space.snapshot()), "0-f bar@0\n");
  EXPECT_TRUE(space.quiescent());
}

TEST(AddressSpace, RemovedHandlersAreFreedWhenNobodyIsInThem) {
  AddressSpace space("memory", 0);
  auto handler = std::make_shared<RecordingHandler>();
  const std::weak_ptr<RecordingHandler> watched = handler;
  auto region = MemoryRegion::io("device", std::move(handler), 0x10);
  ASSERT_TRUE(space.add(region, 0));
  AddressSpace::Reader reader(space);
  reader.write(0, std::array<std::uint8_t, 1>{1});
  ASSERT_TRUE(space.remove(region));
  region.reset();
  EXPECT_TRUE(space.quiescent());
  EXPECT_TRUE(watched.expired());
}

// Refuses to be touched after its end.
class MortalHandler final : public IoHandler {
 public:
  ~MortalHandler() override { alive_.store(false, std::memory_order_relaxed); }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override {
    ASSERT_TRUE(alive_.load(std::memory_order_relaxed));
    std::ranges::fill(data, static_cast<std::uint8_t>(offset));
  }
  void io_write(std::uint64_t, std::span<const std::uint8_t>) override {
    ASSERT_TRUE(alive_.load(std::memory_order_relaxed));
  }

 private:
  std::atomic<bool> alive_ = true;
};

TEST(AddressSpaceReader, ReadersSeeTheOldViewOrTheNewWhileItChanges) {
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add(MemoryRegion::io("fixed", std::make_shared<MortalHandler>(), 0x100), 0));
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      AddressSpace::Reader reader(space);
      while (!stop.load(std::memory_order_relaxed)) {
        std::array<std::uint8_t, 4> data{};
        reader.read(0x42, data);
        ASSERT_EQ(data[0], 0x42);
        reader.read(0x1042, data);
        ASSERT_TRUE(data[0] == 0x42 || data[0] == 0xff);
        reader.write(0x1000, data);
      }
    });
  }
  for (int i = 0; i < 2000; ++i) {
    auto region = MemoryRegion::io("changing", std::make_shared<MortalHandler>(), 0x100);
    ASSERT_TRUE(space.add(region, 0x1000));
    ASSERT_TRUE(space.remove(region));
    if (i % 16 == 0) {
      const AddressSpace::Reader comes_and_goes(space);
      EXPECT_LE(space.snapshot().ranges().size(), 2U);
    }
  }
  stop.store(true);
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_TRUE(space.quiescent());
}

}  // namespace
}  // namespace wisp
