// Randomness as an input that a machine is given, so that it can be seeded or replayed.
#pragma once

#include <cstdint>
#include <span>

#include "base/error.h"

namespace wisp {

class EntropySource {
 public:
  virtual ~EntropySource() = default;
  // Fills the whole buffer.
  [[nodiscard]] virtual Result<void> fill(std::span<std::uint8_t> buffer) = 0;
};

// getrandom(2).
class SystemEntropy final : public EntropySource {
 public:
  [[nodiscard]] Result<void> fill(std::span<std::uint8_t> buffer) override;
};

}  // namespace wisp
