#include "base/state.h"

namespace wisp {

void StateWriter::append(std::span<const std::uint8_t> bytes) {
  bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
}

void StateWriter::put_bytes(std::span<const std::uint8_t> bytes) {
  put(static_cast<std::uint64_t>(bytes.size()));
  append(bytes);
}

void StateWriter::put_string(std::string_view text) {
  put_bytes(std::span(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()));
}

Result<std::span<const std::uint8_t>> StateReader::get_bytes(std::size_t limit) {
  WISP_ASSIGN(const std::uint64_t size, get<std::uint64_t>());
  if (size > limit || size > bytes_.size()) {
    return fail("saved state has a string of {} bytes where at most {} fit", size,
                limit < bytes_.size() ? limit : bytes_.size());
  }
  const auto result = bytes_.first(static_cast<std::size_t>(size));
  bytes_ = bytes_.subspan(static_cast<std::size_t>(size));
  return result;
}

Result<std::string> StateReader::get_string(std::size_t limit) {
  WISP_ASSIGN(const auto bytes, get_bytes(limit));
  return std::string(bytes.begin(), bytes.end());
}

Result<void> check_version(const StateRecord& record, std::uint32_t newest) {
  if (record.version == 0 || record.version > newest) {
    return fail("saved state of {} has version {}, this program knows 1 to {}", record.name, record.version,
                newest);
  }
  return {};
}

}  // namespace wisp
