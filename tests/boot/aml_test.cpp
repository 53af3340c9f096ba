#include "boot/aml.h"

#include <gtest/gtest.h>

namespace wisp::aml {
namespace {

// Expected bytes are those that iasl gives for the same ASL.
static_assert(integer(0) == Bytes{0x00});
static_assert(integer(1) == Bytes{0x01});
static_assert(integer(2) == Bytes{0x0A, 0x02});
static_assert(integer(0xFF) == Bytes{0x0A, 0xFF});
static_assert(integer(0x100) == Bytes{0x0B, 0x00, 0x01});
static_assert(integer(0x1'0000) == Bytes{0x0C, 0x00, 0x00, 0x01, 0x00});
static_assert(integer(0x1'0000'0000) == Bytes{0x0E, 0, 0, 0, 0, 1, 0, 0, 0});
static_assert(string("AB") == Bytes{0x0D, 'A', 'B', 0});
static_assert(eisa_id("PNP0501") == Bytes{0x0C, 0x41, 0xD0, 0x05, 0x01});
static_assert(eisa_id("PNP0C0C") == Bytes{0x0C, 0x41, 0xD0, 0x0C, 0x0C});

static_assert(path("_STA") == Bytes{'_', 'S', 'T', 'A'});
static_assert(path("GED") == Bytes{'G', 'E', 'D', '_'});
static_assert(path("\\") == Bytes{'\\', 0x00});
static_assert(path("\\_SB.GED") == Bytes{'\\', 0x2E, '_', 'S', 'B', '_', 'G', 'E', 'D', '_'});
static_assert(path("^A") == Bytes{'^', 'A', '_', '_', '_'});
static_assert(path("A.B.C") == Bytes{0x2F, 3, 'A', '_', '_', '_', 'B', '_', '_', '_', 'C', '_', '_', '_'});

static_assert(name("FOO", integer(1)) == Bytes{0x08, 'F', 'O', 'O', '_', 0x01});
static_assert(buffer({0xAA}) == Bytes{0x11, 0x03, 0x01, 0xAA});
static_assert(scope("X", integer(1)) == Bytes{0x10, 0x06, 'X', '_', '_', '_', 0x01});
static_assert(device("X", integer(1)) == Bytes{0x5B, 0x82, 0x06, 'X', '_', '_', '_', 0x01});
static_assert(method("M", 1, true, return_value(integer(0))) ==
              Bytes{0x14, 0x08, 'M', '_', '_', '_', 0x09, 0xA4, 0x00});
static_assert(region("R", 1, 0x600, 4) ==
              Bytes{0x5B, 0x80, 'R', '_', '_', '_', 0x01, 0x0B, 0x00, 0x06, 0x0A, 0x04});
static_assert(dword_field("R", {{"A", 32}, {"", 64}}) ==
              Bytes{0x5B, 0x81, 0x0E, 'R', '_', '_', '_', 0x43, 'A', '_', '_', '_', 0x20, 0x00, 0x40, 0x04});
static_assert(store(local(1), path("A")) == Bytes{0x70, 0x61, 'A', '_', '_', '_'});
static_assert(bit_and(local(0), integer(4)) == Bytes{0x7B, 0x60, 0x0A, 0x04, 0x00});
static_assert(if_then(local(0), notify("A", 0x80)) ==
              Bytes{0xA0, 0x09, 0x60, 0x86, 'A', '_', '_', '_', 0x0A, 0x80});
static_assert(io_ports(0x3F8, 8) == Bytes{0x47, 0x01, 0xF8, 0x03, 0xF8, 0x03, 0x01, 0x08});
static_assert(memory32_fixed(0xFEB0'0000, 0x200) ==
              Bytes{0x86, 0x09, 0x00, 0x01, 0x00, 0x00, 0xB0, 0xFE, 0x00, 0x02, 0x00, 0x00});
static_assert(interrupt(5, Trigger::kEdge, Sharing::kShared) ==
              Bytes{0x89, 0x06, 0x00, 0x0B, 0x01, 0x05, 0x00, 0x00, 0x00});
static_assert(interrupt(9, Trigger::kLevel, Sharing::kExclusive) ==
              Bytes{0x89, 0x06, 0x00, 0x01, 0x01, 0x09, 0x00, 0x00, 0x00});
static_assert(resource_template({}) == Bytes{0x11, 0x05, 0x0A, 0x02, 0x79, 0x00});

// GCC 12 does not take lists of two temporaries in a constant expression, so these run.
TEST(Aml, TermsOfSeveralElements) {
  EXPECT_EQ(package({integer(5), integer(0)}), (Bytes{0x12, 0x05, 0x02, 0x0A, 0x05, 0x00}));
  EXPECT_EQ(resource_template({io_ports(0x70, 2), interrupt(8, Trigger::kEdge, Sharing::kExclusive)}),
            (Bytes{0x11, 0x16, 0x0A, 0x13, 0x47, 0x01, 0x70, 0x00, 0x70, 0x00, 0x01, 0x02,
                   0x89, 0x06, 0x00, 0x03, 0x01, 0x08, 0x00, 0x00, 0x00, 0x79, 0x00}));
}

// PkgLength at the edges of its four forms (ACPI 6.5, 20.2.4).
TEST(Aml, PackageLengthEdges) {
  const auto length_of = [](std::size_t body) { return detail::package_length(body, true); };
  EXPECT_EQ(length_of(0), (Bytes{0x01}));
  EXPECT_EQ(length_of(0x3E), (Bytes{0x3F}));
  EXPECT_EQ(length_of(0x3F), (Bytes{0x41, 0x04}));
  EXPECT_EQ(length_of(0xFFD), (Bytes{0x4F, 0xFF}));
  EXPECT_EQ(length_of(0xFFE), (Bytes{0x81, 0x00, 0x01}));
  EXPECT_EQ(length_of(0xF'FFFC), (Bytes{0x8F, 0xFF, 0xFF}));
  EXPECT_EQ(length_of(0xF'FFFD), (Bytes{0xC1, 0x00, 0x00, 0x01}));
  EXPECT_EQ(detail::package_length(0x3F, false), (Bytes{0x3F}));
  EXPECT_EQ(detail::package_length(0x40, false), (Bytes{0x40, 0x04}));
}

}  // namespace
}  // namespace wisp::aml
