// Makes cases for the differential test: valid instructions of every kind that ring 3 may try, with operands
// that reach the corners.
#pragma once

#include <cstdint>
#include <random>

#include "hypervisor/soft/insn.h"
#include "hypervisor/soft/native_case.h"

namespace wisp::soft {

class CaseGenerator final {
 public:
  CaseGenerator(std::uint64_t seed, std::uint64_t fs_base) : random_(seed), fs_base_(fs_base) {}

  void make_data(CaseData& data);
  // `insn` is what the decoder says of the case's bytes.
  void make_case(Case& out, Insn& insn);
  // Up to a dozen instructions that run one after another, with jumps forward among them.
  void make_sequence(Case& out);
  // Only instructions for which this holds; null: all.
  void set_filter(bool (*filter)(const Insn&)) { filter_ = filter; }

 private:
  [[nodiscard]] std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
  [[nodiscard]] bool chance(unsigned percent) { return below(100) < percent; }
  [[nodiscard]] std::uint64_t value();
  [[nodiscard]] std::uint64_t window();
  [[nodiscard]] std::uint64_t address(std::uint32_t size);
  [[nodiscard]] std::uint64_t code_address();
  void make_bytes();
  [[nodiscard]] bool suits() const;
  [[nodiscard]] bool suits_sequence() const;
  [[nodiscard]] bool next_of_sequence(bool first);
  void make_registers();
  void place_code();
  void make_vectors();
  void prepare_operation();
  [[nodiscard]] bool aim();
  [[nodiscard]] bool aim_at(std::uint64_t target);
  void patch(std::size_t at, std::uint64_t value, std::size_t size);
  void relative_branch();

  std::mt19937_64 random_;
  const std::uint64_t fs_base_;
  bool (*filter_)(const Insn&) = nullptr;
  Case case_{};
  Insn insn_{};
};

}  // namespace wisp::soft
