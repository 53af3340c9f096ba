#include "hypervisor/soft/translator.h"

namespace wisp::soft {

bool Translator::possible() {
  return false;
}
Result<std::unique_ptr<Translator>> Translator::create(PhysicalMemory& /*memory*/, SharedCode& /*shared*/) {
  return fail("not built");
}
struct TranslatedRunner::Impl {};
TranslatedRunner::TranslatedRunner(Core /*core*/, SharedCode& /*shared*/, Stepper& /*stepper*/) {}
TranslatedRunner::~TranslatedRunner() = default;
bool TranslatedRunner::ready() const {
  return false;
}
Outcome TranslatedRunner::run() {
  return Outcome::kNext;
}

}  // namespace wisp::soft
