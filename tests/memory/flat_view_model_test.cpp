// Random trees, changed at random, against a resolver that looks each byte up by walking the tree.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <optional>
#include <random>

#include "memory/address_space.h"
#include "memory/recording_parts.h"

namespace wisp {
namespace {

constexpr std::uint64_t kSpace = 0x200;

// The tree as the model knows it: independent of MemoryRegion's own.
struct Node {
  RegionKind kind = RegionKind::kContainer;
  std::uint64_t size = 0;
  std::size_t target = 0;
  std::uint64_t target_offset = 0;
  struct Child {
    std::size_t node = 0;
    std::uint64_t offset = 0;
    int priority = 0;
    std::uint64_t added = 0;
  };
  std::vector<Child> children;
  std::optional<std::size_t> parent;
  MemoryRegionPtr region;
};

struct Answer {
  std::size_t node = 0;
  std::uint64_t offset = 0;
  bool operator==(const Answer&) const = default;
};

class Model {
 public:
  explicit Model(std::uint32_t seed) : random_(seed), host_(0x1000) {
    nodes_.push_back(
        {.kind = RegionKind::kContainer, .size = kSpace, .children = {}, .parent = {}, .region = {}});
  }

  void step() {
    switch (pick(6)) {
      case 0:
      case 1:
      case 2:
        add();
        break;
      case 3:
        remove();
        break;
      default:
        create();
        break;
    }
  }

  void check() {
    const FlatView view = space_.snapshot();
    for (std::uint64_t at = 0; at < kSpace; ++at) {
      const std::optional<Answer> wanted = resolve(0, at, 0);
      const FlatRange* range = view.find(at);
      ASSERT_EQ(range != nullptr, wanted.has_value()) << at;
      if (range == nullptr) {
        continue;
      }
      const std::uint64_t offset = range->region_offset + (at - range->start);
      ASSERT_EQ(range->name, std::to_string(wanted->node)) << at;
      ASSERT_EQ(offset, wanted->offset) << at;
      ASSERT_EQ(range->kind, nodes_[wanted->node].kind);
      if (range->kind != RegionKind::kIo) {
        ASSERT_EQ(range->host + (at - range->start), host_.data() + wanted->offset);
      }
    }
    const FlatRange* before = nullptr;
    for (const FlatRange& range : view.ranges()) {
      if (before != nullptr) {
        ASSERT_GE(range.start, before->start + before->size) << "sorted, without overlap";
        ASSERT_FALSE(range.name == before->name && range.start == before->start + before->size &&
                     range.region_offset == before->region_offset + before->size)
            << "maximal ranges";
      }
      before = &range;
    }
    std::vector<std::string> lines;
    for (const FlatRange& range : view.ranges()) {
      lines.push_back(text_of(range));
    }
    std::ranges::sort(lines);
    std::string joined;
    for (const std::string& line : lines) {
      joined += line;
    }
    ASSERT_EQ(listener_.present(), joined) << "the listener knows the same";
  }

  void listen() { ASSERT_TRUE(space_.add_listener(&listener_)); }
  [[nodiscard]] int refused() const { return refused_; }
  [[nodiscard]] int accepted() const { return accepted_; }

 private:
  std::uint64_t pick(std::uint64_t below) { return random_() % below; }

  void create() {
    if (nodes_.size() > 24) {
      return;
    }
    Node node;
    node.size = 1 + pick(0x80);
    const std::string name = std::to_string(nodes_.size());
    switch (pick(5)) {
      case 0:
        node.kind = RegionKind::kContainer;
        node.region = MemoryRegion::container(name, node.size);
        break;
      case 1:
        node.kind = RegionKind::kRam;
        node.region = MemoryRegion::ram(name, host_.data(), node.size);
        break;
      case 2:
        node.kind = RegionKind::kRom;
        node.region = MemoryRegion::rom(name, host_.data(), node.size);
        break;
      case 3:
        node.kind = RegionKind::kIo;
        node.region = MemoryRegion::io(name, std::make_shared<RecordingHandler>(), node.size);
        break;
      default: {
        if (nodes_.size() < 2) {
          return;
        }
        node.kind = RegionKind::kAlias;
        node.target = 1 + pick(nodes_.size() - 1);
        const std::uint64_t whole = nodes_[node.target].size;
        node.target_offset = pick(whole);
        node.size = 1 + pick(whole - node.target_offset);
        node.region = MemoryRegion::alias(name, nodes_[node.target].region, node.target_offset, node.size);
        break;
      }
    }
    nodes_.push_back(std::move(node));
  }

  // Whether `from` leads to `to` by children or aliases.
  bool leads_to(std::size_t from, std::size_t to) const {
    if (from == to) {
      return true;
    }
    const Node& node = nodes_[from];
    if (node.kind == RegionKind::kAlias && leads_to(node.target, to)) {
      return true;
    }
    return std::ranges::any_of(node.children, [&](const Node::Child& c) { return leads_to(c.node, to); });
  }

  void add() {
    if (nodes_.size() < 2) {
      return;
    }
    const std::size_t child = 1 + pick(nodes_.size() - 1);
    const std::size_t parent = pick(2) == 0 ? 0 : pick(nodes_.size());
    const std::uint64_t offset = pick(nodes_[parent].size);
    const int priority = static_cast<int>(pick(3)) - 1;
    const bool allowed = !nodes_[child].parent && nodes_[parent].kind == RegionKind::kContainer &&
                         offset + nodes_[child].size <= nodes_[parent].size && !leads_to(child, parent);
    const AddressSpace::Change change{.region = nodes_[child].region,
                                      .parent = parent == 0 ? nullptr : nodes_[parent].region,
                                      .offset = offset,
                                      .priority = priority};
    ASSERT_EQ(space_.commit({&change, 1}).has_value(), allowed);
    ++(allowed ? accepted_ : refused_);
    if (allowed) {
      nodes_[parent].children.push_back({child, offset, priority, ++clock_});
      nodes_[child].parent = parent;
    }
  }

  void remove() {
    if (nodes_.size() < 2) {
      return;
    }
    const std::size_t child = 1 + pick(nodes_.size() - 1);
    Node& node = nodes_[child];
    ASSERT_EQ(space_.remove(node.region).has_value(), node.parent.has_value());
    if (node.parent) {
      std::erase_if(nodes_[*node.parent].children, [&](const Node::Child& c) { return c.node == child; });
      node.parent.reset();
    }
  }

  // What answers byte `at` of `which`: a plain walk that knows nothing of ranges.
  std::optional<Answer> resolve(std::size_t which, std::uint64_t at, int depth) const {
    const Node& node = nodes_[which];
    if (at >= node.size) {
      return std::nullopt;
    }
    if (node.kind == RegionKind::kAlias) {
      return resolve(node.target, at + node.target_offset, depth + 1);
    }
    if (node.kind != RegionKind::kContainer) {
      return Answer{which, at};
    }
    std::vector<Node::Child> order = node.children;
    std::ranges::sort(order, [](const Node::Child& a, const Node::Child& b) {
      return a.priority != b.priority ? a.priority > b.priority : a.added > b.added;
    });
    for (const Node::Child& child : order) {
      if (at >= child.offset) {
        if (const auto answer = resolve(child.node, at - child.offset, depth + 1)) {
          return answer;
        }
      }
    }
    return std::nullopt;
  }

  std::mt19937 random_;
  std::vector<std::uint8_t> host_;
  AddressSpace space_{"model", kSpace};
  RecordingListener listener_;
  std::vector<Node> nodes_;
  std::uint64_t clock_ = 0;
  int refused_ = 0;
  int accepted_ = 0;
};

TEST(FlatViewModel, RandomTreesResolveAsAPlainWalkDoes) {
  int accepted = 0;
  int refused = 0;
  for (std::uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Model model(seed);
    model.listen();
    for (int step = 0; step < 80; ++step) {
      ASSERT_NO_FATAL_FAILURE(model.step());
      ASSERT_NO_FATAL_FAILURE(model.check());
    }
    accepted += model.accepted();
    refused += model.refused();
  }
  EXPECT_GT(accepted, 500);
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace wisp
