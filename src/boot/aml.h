// A builder of ACPI Machine Language (ACPI 6.5, chapter 20): each function gives the bytes of one term, and
// terms nest by being passed as arguments. All of it runs at compile time too.
//
// Names are fixed by the program, so a malformed one is a bug and aborts (or fails to compile).
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace wisp::aml {

using Bytes = std::vector<std::uint8_t>;
using Terms = std::initializer_list<Bytes>;

namespace detail {

[[noreturn]] inline void malformed() {
  __builtin_trap();
}

constexpr void append(Bytes& to, const Bytes& from) {
  to.insert(to.end(), from.begin(), from.end());
}

constexpr void append_le(Bytes& to, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    to.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
  }
}

// One NameSeg: a letter or '_' first, padded to four characters with '_'.
constexpr void append_segment(Bytes& to, std::string_view segment) {
  if (segment.empty() || segment.size() > 4 || (segment[0] >= '0' && segment[0] <= '9')) {
    malformed();
  }
  for (std::size_t i = 0; i < 4; ++i) {
    const char c = i < segment.size() ? segment[i] : '_';
    if ((c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_') {
      malformed();
    }
    to.push_back(static_cast<std::uint8_t>(c));
  }
}

// A number in the form of PkgLength (20.2.4) in the fewest bytes. `counts_itself`: the value grows by the
// bytes of the encoding, as a package's length does and a field's width does not.
constexpr Bytes package_length(std::size_t value, bool counts_itself) {
  Bytes out;
  if (value + (counts_itself ? 1 : 0) < 0x40) {
    out.push_back(static_cast<std::uint8_t>(value + (counts_itself ? 1 : 0)));
    return out;
  }
  for (std::size_t more = 1; more <= 3; ++more) {
    const std::size_t total = value + (counts_itself ? more + 1 : 0);
    if (total < std::size_t{1} << (4 + 8 * more)) {
      out.push_back(static_cast<std::uint8_t>(more << 6 | (total & 0xF)));
      append_le(out, total >> 4, static_cast<int>(more));
      return out;
    }
  }
  malformed();
}

constexpr Bytes packaged(std::initializer_list<std::uint8_t> opcode, const Bytes& body) {
  Bytes out(opcode);
  append(out, package_length(body.size(), true));
  append(out, body);
  return out;
}

}  // namespace detail

// Terms one after another.
constexpr Bytes join(Terms terms) {
  Bytes out;
  for (const Bytes& term : terms) {
    detail::append(out, term);
  }
  return out;
}

// A NameString (20.2.2): "\\_SB.GED", "^X", "_CRS".
constexpr Bytes path(std::string_view text) {
  Bytes out;
  while (!text.empty() && (text.front() == '\\' || text.front() == '^')) {
    out.push_back(static_cast<std::uint8_t>(text.front()));
    text.remove_prefix(1);
  }
  Bytes segments;
  std::size_t count = 0;
  while (!text.empty()) {
    const std::size_t dot = text.find('.');
    detail::append_segment(segments, text.substr(0, dot));
    ++count;
    text.remove_prefix(dot == std::string_view::npos ? text.size() : dot + 1);
  }
  if (count == 0) {
    out.push_back(0x00);  // NullName
  } else if (count == 2) {
    out.push_back(0x2E);  // DualNamePrefix
  } else if (count > 2) {
    out.push_back(0x2F);  // MultiNamePrefix
    out.push_back(static_cast<std::uint8_t>(count));
  }
  detail::append(out, segments);
  return out;
}

// --- Data objects (20.2.3) -------------------------------------------------------------------------------

constexpr Bytes integer(std::uint64_t value) {
  Bytes out;
  if (value <= 1) {
    out.push_back(static_cast<std::uint8_t>(value));  // ZeroOp, OneOp
    return out;
  }
  const int bytes = value <= 0xFF ? 1 : value <= 0xFFFF ? 2 : value <= 0xFFFF'FFFF ? 4 : 8;
  out.push_back(bytes == 1 ? 0x0A : bytes == 2 ? 0x0B : bytes == 4 ? 0x0C : 0x0E);
  detail::append_le(out, value, bytes);
  return out;
}

constexpr Bytes string(std::string_view text) {
  Bytes out{0x0D};
  for (const char c : text) {
    out.push_back(static_cast<std::uint8_t>(c));
  }
  out.push_back(0);
  return out;
}

// A PNP id such as "PNP0501" in the compressed form of the EISAID macro (19.6.38).
constexpr Bytes eisa_id(std::string_view id) {
  if (id.size() != 7) {
    detail::malformed();
  }
  std::uint32_t value = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    value = value << 5 | static_cast<std::uint32_t>(id[i] - '@');
  }
  for (std::size_t i = 3; i < 7; ++i) {
    const char c = id[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (digit < 0) {
      detail::malformed();
    }
    value = value << 4 | static_cast<std::uint32_t>(digit);
  }
  Bytes out{0x0C};
  for (int shift = 24; shift >= 0; shift -= 8) {
    out.push_back(static_cast<std::uint8_t>(value >> shift));
  }
  return out;
}

constexpr Bytes package(Terms elements) {
  Bytes body{static_cast<std::uint8_t>(elements.size())};
  detail::append(body, join(elements));
  return detail::packaged({0x12}, body);
}

constexpr Bytes buffer(const Bytes& content) {
  Bytes body = integer(content.size());
  detail::append(body, content);
  return detail::packaged({0x11}, body);
}

// --- Named objects (20.2.5) ------------------------------------------------------------------------------

constexpr Bytes name(std::string_view object, const Bytes& value) {
  return join({{0x08}, path(object), value});
}

constexpr Bytes scope(std::string_view at, const Bytes& body) {
  return detail::packaged({0x10}, join({path(at), body}));
}

constexpr Bytes device(std::string_view at, const Bytes& body) {
  return detail::packaged({0x5B, 0x82}, join({path(at), body}));
}

constexpr Bytes method(std::string_view at, unsigned arguments, bool serialized, const Bytes& body) {
  const Bytes flags{static_cast<std::uint8_t>((arguments & 7U) | (serialized ? 8U : 0U))};
  return detail::packaged({0x14}, join({path(at), flags, body}));
}

// `space`: 0 SystemMemory, 1 SystemIO.
constexpr Bytes region(std::string_view at, std::uint8_t space, std::uint64_t address, std::uint64_t size) {
  return join({{0x5B, 0x80}, path(at), {space}, integer(address), integer(size)});
}

struct FieldUnit {
  std::string_view name;  // empty: bits that have no name
  std::uint32_t bits;
};

// Fields of an operation region read and written as double words; bits not named are written as zeroes.
constexpr Bytes dword_field(std::string_view region, std::initializer_list<FieldUnit> units) {
  Bytes body = path(region);
  body.push_back(0x03 | 2 << 5);  // DWordAcc, NoLock, WriteAsZeros
  for (const FieldUnit& unit : units) {
    if (unit.name.empty()) {
      body.push_back(0x00);
    } else {
      detail::append_segment(body, unit.name);
    }
    detail::append(body, detail::package_length(unit.bits, false));
  }
  return detail::packaged({0x5B, 0x81}, body);
}

// --- Statements and expressions (20.2.5.3, 20.2.5.4) -----------------------------------------------------

constexpr Bytes local(unsigned index) {
  return {static_cast<std::uint8_t>(0x60 + index)};
}

constexpr Bytes store(const Bytes& value, const Bytes& target) {
  return join({{0x70}, value, target});
}

// The value a & b, stored nowhere.
constexpr Bytes bit_and(const Bytes& a, const Bytes& b) {
  return join({{0x7B}, a, b, {0x00}});
}

constexpr Bytes if_then(const Bytes& condition, const Bytes& body) {
  return detail::packaged({0xA0}, join({condition, body}));
}

constexpr Bytes notify(std::string_view object, std::uint8_t value) {
  return join({{0x86}, path(object), integer(value)});
}

constexpr Bytes return_value(const Bytes& value) {
  return join({{0xA4}, value});
}

// --- Resource descriptors (6.4) --------------------------------------------------------------------------

// Small I/O port descriptor, 16-bit decode.
constexpr Bytes io_ports(std::uint16_t base, std::uint8_t count) {
  Bytes out{0x47, 0x01};
  detail::append_le(out, base, 2);
  detail::append_le(out, base, 2);
  out.push_back(1);  // alignment
  out.push_back(count);
  return out;
}

// 32-bit fixed memory range descriptor, read-write.
constexpr Bytes memory32_fixed(std::uint32_t base, std::uint32_t size) {
  Bytes out{0x86, 0x09, 0x00, 0x01};
  detail::append_le(out, base, 4);
  detail::append_le(out, size, 4);
  return out;
}

enum class Trigger : std::uint8_t { kLevel = 0, kEdge = 2 };
enum class Sharing : std::uint8_t { kExclusive = 0, kShared = 8 };

// Extended interrupt descriptor: consumer, active high.
constexpr Bytes interrupt(std::uint32_t gsi, Trigger trigger, Sharing sharing) {
  const auto flags = 1U | static_cast<unsigned>(trigger) | static_cast<unsigned>(sharing);
  Bytes out{0x89, 0x06, 0x00, static_cast<std::uint8_t>(flags), 0x01};
  detail::append_le(out, gsi, 4);
  return out;
}

// The descriptors as a buffer with its end tag.
constexpr Bytes resource_template(Terms descriptors) {
  return buffer(join({join(descriptors), {0x79, 0x00}}));
}

}  // namespace wisp::aml
