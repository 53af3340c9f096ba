#include <iterator>

#include "hypervisor/soft/decoder_tables.h"

namespace wisp::soft::tables {
namespace {

struct Row {
  std::uint8_t map = 0;
  std::uint8_t prefix = 0;
  std::uint8_t first = 0;  // opcodes first..last are alike
  std::uint8_t last = 0;
  Spec spec{};
};

constexpr std::uint8_t kVx = kVr | kX;
constexpr std::uint8_t kVw = kVr | kW;
constexpr std::uint8_t kVs = kVr | kR;
constexpr Feature kBase = Feature::kBase;

// reg <- f(reg or vvvv, rm)
constexpr Row op3(std::uint8_t map, std::uint8_t prefix, std::uint8_t first, std::uint8_t last,
                  std::uint8_t memory, std::uint32_t bits = 0, Imm imm = Imm::kNone,
                  Feature feature = kBase) {
  return {map, prefix, first, last, {Op::kNative, kVx, kVs, imm, memory, kModrm | kVvvv | bits, feature}};
}
// reg <- f(rm)
constexpr Row op2(std::uint8_t map, std::uint8_t prefix, std::uint8_t first, std::uint8_t last,
                  std::uint8_t memory, std::uint32_t bits = 0, Imm imm = Imm::kNone,
                  Feature feature = kBase) {
  return {map, prefix, first, last, {Op::kNative, kVw, kVs, imm, memory, kModrm | bits, feature}};
}
// rm <- reg
constexpr Row store(std::uint8_t map, std::uint8_t prefix, std::uint8_t opcode, std::uint8_t memory,
                    std::uint32_t bits = 0, Imm imm = Imm::kNone, Feature feature = kBase) {
  return {map, prefix, opcode, opcode, {Op::kNative, kVs, kVw, imm, memory, kModrm | bits, feature}};
}
// Any operands.
constexpr Row row(std::uint8_t map, std::uint8_t prefix, std::uint8_t opcode, std::uint8_t reg,
                  std::uint8_t rm, std::uint8_t memory, std::uint32_t bits = 0, Imm imm = Imm::kNone,
                  Feature feature = kBase) {
  return {map, prefix, opcode, opcode, {Op::kNative, reg, rm, imm, memory, kModrm | bits, feature}};
}

constexpr std::uint32_t kAl = kAligned;
constexpr Imm kI8 = Imm::kByteZero;
constexpr std::uint8_t kMr = kMm | kR, kMw = kMm | kW;

constexpr Row kRows[] = {
    // --- 0F, moves
    op2(1, 0, 0x10, 0x10, kFull),
    op2(1, 0x66, 0x10, 0x10, kFull),
    op3(1, 0xf3, 0x10, 0x10, 4, kVvvvOnRegister),
    op3(1, 0xf2, 0x10, 0x10, 8, kVvvvOnRegister),
    store(1, 0, 0x11, kFull),
    store(1, 0x66, 0x11, kFull),
    store(1, 0xf3, 0x11, 4, kVvvvOnRegister | kVvvv),
    store(1, 0xf2, 0x11, 8, kVvvvOnRegister | kVvvv),
    op3(1, 0, 0x12, 0x12, 8, kL0),
    op3(1, 0x66, 0x12, 0x12, 8, kL0 | kMemoryOnly),
    op2(1, 0xf3, 0x12, 0x12, kFull, kAl),
    op2(1, 0xf2, 0x12, 0x12, kHalf),
    store(1, 0, 0x13, 8, kL0 | kMemoryOnly),
    store(1, 0x66, 0x13, 8, kL0 | kMemoryOnly),
    op3(1, 0, 0x14, 0x15, kFull, kAl),
    op3(1, 0x66, 0x14, 0x15, kFull, kAl),
    op3(1, 0, 0x16, 0x16, 8, kL0),
    op3(1, 0x66, 0x16, 0x16, 8, kL0 | kMemoryOnly),
    op2(1, 0xf3, 0x16, 0x16, kFull, kAl),
    store(1, 0, 0x17, 8, kL0 | kMemoryOnly),
    store(1, 0x66, 0x17, 8, kL0 | kMemoryOnly),
    op2(1, 0, 0x28, 0x28, kFull, kAl | kAlignedVex),
    op2(1, 0x66, 0x28, 0x28, kFull, kAl | kAlignedVex),
    store(1, 0, 0x29, kFull, kAl | kAlignedVex),
    store(1, 0x66, 0x29, kFull, kAl | kAlignedVex),
    row(1, 0, 0x2a, kVx, kMr, 8, kLegacy),
    row(1, 0x66, 0x2a, kVx, kMr, 8, kLegacy),
    row(1, 0xf3, 0x2a, kVx, kGy | kR, kBySize, kVvvv),
    row(1, 0xf2, 0x2a, kVx, kGy | kR, kBySize, kVvvv),
    store(1, 0, 0x2b, kFull, kAl | kAlignedVex | kMemoryOnly),
    store(1, 0x66, 0x2b, kFull, kAl | kAlignedVex | kMemoryOnly),
    row(1, 0, 0x2c, kMw, kVs, 8, kLegacy),
    row(1, 0, 0x2d, kMw, kVs, 8, kLegacy),
    row(1, 0x66, 0x2c, kMw, kVs, 16, kLegacy | kAl),
    row(1, 0x66, 0x2d, kMw, kVs, 16, kLegacy | kAl),
    row(1, 0xf3, 0x2c, kGy | kW, kVs, 4),
    row(1, 0xf3, 0x2d, kGy | kW, kVs, 4),
    row(1, 0xf2, 0x2c, kGy | kW, kVs, 8),
    row(1, 0xf2, 0x2d, kGy | kW, kVs, 8),
    op2(1, 0, 0x2e, 0x2f, 4, kFlags),
    op2(1, 0x66, 0x2e, 0x2f, 8, kFlags),
    // --- arithmetic
    row(1, 0, 0x50, kGd | kW, kVs, 0, kRegisterOnly),
    row(1, 0x66, 0x50, kGd | kW, kVs, 0, kRegisterOnly),
    op2(1, 0, 0x51, 0x53, kFull, kAl),
    op2(1, 0x66, 0x51, 0x51, kFull, kAl),
    op3(1, 0xf3, 0x51, 0x53, 4),
    op3(1, 0xf2, 0x51, 0x51, 8),
    op3(1, 0, 0x54, 0x57, kFull, kAl),
    op3(1, 0x66, 0x54, 0x57, kFull, kAl),
    op3(1, 0, 0x58, 0x59, kFull, kAl),
    op3(1, 0x66, 0x58, 0x59, kFull, kAl),
    op3(1, 0xf3, 0x58, 0x59, 4),
    op3(1, 0xf2, 0x58, 0x59, 8),
    op2(1, 0, 0x5a, 0x5a, kHalf),
    op2(1, 0x66, 0x5a, 0x5a, kFull, kAl),
    op3(1, 0xf3, 0x5a, 0x5a, 4),
    op3(1, 0xf2, 0x5a, 0x5a, 8),
    op2(1, 0, 0x5b, 0x5b, kFull, kAl),
    op2(1, 0x66, 0x5b, 0x5b, kFull, kAl),
    op2(1, 0xf3, 0x5b, 0x5b, kFull, kAl),
    op3(1, 0, 0x5c, 0x5f, kFull, kAl),
    op3(1, 0x66, 0x5c, 0x5f, kFull, kAl),
    op3(1, 0xf3, 0x5c, 0x5f, 4),
    op3(1, 0xf2, 0x5c, 0x5f, 8),
    row(1, 0, 0x60, kMm | kX, kMr, 4, kLegacy),
    row(1, 0, 0x61, kMm | kX, kMr, 4, kLegacy),
    row(1, 0, 0x62, kMm | kX, kMr, 4, kLegacy),
    op3(1, 0x66, 0x60, 0x62, kFull, kAl | kL1Avx2),
    op3(1, 0x66, 0x63, 0x6b, kFull, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0x6c, 0x6d, kFull, kAl | kL1Avx2),
    row(1, 0, 0x6e, kMw, kGy | kR, kBySize, kLegacy),
    row(1, 0x66, 0x6e, kVw, kGy | kR, kBySize, kL0),
    row(1, 0, 0x6f, kMw, kMr, 8, kLegacy),
    op2(1, 0x66, 0x6f, 0x6f, kFull, kAl | kAlignedVex),
    op2(1, 0xf3, 0x6f, 0x6f, kFull),
    row(1, 0, 0x70, kMw, kMr, 8, kLegacy, kI8),
    op2(1, 0x66, 0x70, 0x70, kFull, kAl | kL1Avx2, kI8),
    op2(1, 0xf3, 0x70, 0x70, kFull, kAl | kL1Avx2, kI8),
    op2(1, 0xf2, 0x70, 0x70, kFull, kAl | kL1Avx2, kI8),
    // Shift groups: the register is rm, with VEX the result is vvvv; the decoder checks /digit.
    {1, 0x66, 0x71, 0x73, {Op::kNative, 0, kVx, kI8, 0, kModrm | kRegisterOnly | kVvvv | kL1Avx2 | kMmxToo}},
    op3(1, 0x66, 0x74, 0x76, kFull, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0x7c, 0x7d, kFull, kAl),
    op3(1, 0xf2, 0x7c, 0x7d, kFull, kAl),
    row(1, 0, 0x7e, kMr, kGy | kW, kBySize, kLegacy),
    row(1, 0x66, 0x7e, kVs, kGy | kW, kBySize, kL0),
    op2(1, 0xf3, 0x7e, 0x7e, 8, kL0),
    row(1, 0, 0x7f, kMr, kMw, 8, kLegacy),
    store(1, 0x66, 0x7f, kFull, kAl | kAlignedVex),
    store(1, 0xf3, 0x7f, kFull),
    row(1, 0xf3, 0xb8, kGv | kW, kGv | kR, kBySize, kLegacy | kFlags),  // POPCNT
    op3(1, 0, 0xc2, 0xc2, kFull, kAl, kI8),
    op3(1, 0x66, 0xc2, 0xc2, kFull, kAl, kI8),
    op3(1, 0xf3, 0xc2, 0xc2, 4, 0, kI8),
    op3(1, 0xf2, 0xc2, 0xc2, 8, 0, kI8),
    row(1, 0, 0xc4, kMm | kX, kGd | kR, 2, kLegacy, kI8),
    row(1, 0x66, 0xc4, kVx, kGd | kR, 2, kVvvv | kL0, kI8),
    row(1, 0, 0xc5, kGd | kW, kMr, 0, kLegacy | kRegisterOnly, kI8),
    row(1, 0x66, 0xc5, kGd | kW, kVs, 0, kRegisterOnly | kL0, kI8),
    op3(1, 0, 0xc6, 0xc6, kFull, kAl, kI8),
    op3(1, 0x66, 0xc6, 0xc6, kFull, kAl, kI8),
    op3(1, 0x66, 0xd0, 0xd0, kFull, kAl),
    op3(1, 0xf2, 0xd0, 0xd0, kFull, kAl),
    op3(1, 0x66, 0xd1, 0xd3, 16, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0xd4, 0xd5, kFull, kAl | kL1Avx2 | kMmxToo),
    store(1, 0x66, 0xd6, 8, kL0),
    row(1, 0xf3, 0xd6, kVw, kMr, 0, kLegacy | kRegisterOnly),
    row(1, 0xf2, 0xd6, kMw, kVs, 0, kLegacy | kRegisterOnly),
    row(1, 0, 0xd7, kGd | kW, kMr, 0, kLegacy | kRegisterOnly),
    row(1, 0x66, 0xd7, kGd | kW, kVs, 0, kRegisterOnly | kL1Avx2),
    op3(1, 0x66, 0xd8, 0xe0, kFull, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0xe1, 0xe2, 16, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0xe3, 0xe5, kFull, kAl | kL1Avx2 | kMmxToo),
    op2(1, 0x66, 0xe6, 0xe6, kFull, kAl),
    op2(1, 0xf3, 0xe6, 0xe6, kHalf),
    op2(1, 0xf2, 0xe6, 0xe6, kFull, kAl),
    row(1, 0, 0xe7, kMr, kMw, 8, kLegacy | kMemoryOnly),
    store(1, 0x66, 0xe7, kFull, kAl | kAlignedVex | kMemoryOnly),
    op3(1, 0x66, 0xe8, 0xef, kFull, kAl | kL1Avx2 | kMmxToo),
    op2(1, 0xf2, 0xf0, 0xf0, kFull, kMemoryOnly),
    op3(1, 0x66, 0xf1, 0xf3, 16, kAl | kL1Avx2 | kMmxToo),
    op3(1, 0x66, 0xf4, 0xf6, kFull, kAl | kL1Avx2 | kMmxToo),
    {1, 0, 0xf7, 0xf7, {Op::kMaskMoveBytes, kMr, kMr, Imm::kNone, 0, kModrm | kLegacy | kRegisterOnly}},
    {1, 0x66, 0xf7, 0xf7, {Op::kMaskMoveBytes, kVs, kVs, Imm::kNone, 0, kModrm | kRegisterOnly | kL0}},
    op3(1, 0x66, 0xf8, 0xfe, kFull, kAl | kL1Avx2 | kMmxToo),
    {1, 0, 0x77, 0x77, {Op::kNative, 0, 0, Imm::kNone, 0, kLegacy}},   // EMMS
    {1, 0, 0x77, 0x77, {Op::kNative, 0, 0, Imm::kNone, 0, kVexOnly}},  // VZEROUPPER, VZEROALL

    // --- 0F38
    op3(2, 0x66, 0x00, 0x0b, kFull, kAl | kL1Avx2 | kMmxToo),
    op3(2, 0x66, 0x0c, 0x0d, kFull, kVexOnly | kW0),
    op2(2, 0x66, 0x0e, 0x0f, kFull, kVexOnly | kW0 | kFlags),
    op3(2, 0x66, 0x10, 0x10, 16, kLegacy | kAl),
    op2(2, 0x66, 0x13, 0x13, kHalf, kVexOnly | kW0, Imm::kNone, Feature::kF16c),
    op3(2, 0x66, 0x14, 0x15, 16, kLegacy | kAl),
    op3(2, 0x66, 0x16, 0x16, kFull, kVexOnly | kL1 | kW0, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x17, 0x17, kFull, kAl | kFlags),
    op2(2, 0x66, 0x18, 0x18, 4, kVexOnly | kW0),
    op2(2, 0x66, 0x19, 0x19, 8, kVexOnly | kW0 | kL1),
    op2(2, 0x66, 0x1a, 0x1a, 16, kVexOnly | kW0 | kL1 | kMemoryOnly),
    op2(2, 0x66, 0x1c, 0x1e, kFull, kAl | kL1Avx2 | kMmxToo),
    op2(2, 0x66, 0x20, 0x20, kHalf, kL1Avx2),
    op2(2, 0x66, 0x21, 0x21, kQuarter, kL1Avx2),
    op2(2, 0x66, 0x22, 0x22, kEighth, kL1Avx2),
    op2(2, 0x66, 0x23, 0x23, kHalf, kL1Avx2),
    op2(2, 0x66, 0x24, 0x24, kQuarter, kL1Avx2),
    op2(2, 0x66, 0x25, 0x25, kHalf, kL1Avx2),
    op3(2, 0x66, 0x28, 0x29, kFull, kAl | kL1Avx2),
    op2(2, 0x66, 0x2a, 0x2a, kFull, kAl | kAlignedVex | kMemoryOnly | kL1Avx2),
    op3(2, 0x66, 0x2b, 0x2b, kFull, kAl | kL1Avx2),
    {2,
     0x66,
     0x2c,
     0x2f,
     {Op::kMaskMove, kVr, 0, Imm::kNone, kFull, kModrm | kVvvv | kVexOnly | kMemoryOnly | kW0}},
    op2(2, 0x66, 0x30, 0x30, kHalf, kL1Avx2),
    op2(2, 0x66, 0x31, 0x31, kQuarter, kL1Avx2),
    op2(2, 0x66, 0x32, 0x32, kEighth, kL1Avx2),
    op2(2, 0x66, 0x33, 0x33, kHalf, kL1Avx2),
    op2(2, 0x66, 0x34, 0x34, kQuarter, kL1Avx2),
    op2(2, 0x66, 0x35, 0x35, kHalf, kL1Avx2),
    op3(2, 0x66, 0x36, 0x36, kFull, kVexOnly | kL1 | kW0, Imm::kNone, Feature::kAvx2),
    op3(2, 0x66, 0x37, 0x40, kFull, kAl | kL1Avx2),
    op2(2, 0x66, 0x41, 0x41, kFull, kAl | kL0),
    op3(2, 0x66, 0x45, 0x45, kFull, kVexOnly, Imm::kNone, Feature::kAvx2),
    op3(2, 0x66, 0x46, 0x46, kFull, kVexOnly | kW0, Imm::kNone, Feature::kAvx2),
    op3(2, 0x66, 0x47, 0x47, kFull, kVexOnly, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x58, 0x58, 4, kVexOnly | kW0, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x59, 0x59, 8, kVexOnly | kW0, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x5a, 0x5a, 16, kVexOnly | kW0 | kL1 | kMemoryOnly, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x78, 0x78, 1, kVexOnly | kW0, Imm::kNone, Feature::kAvx2),
    op2(2, 0x66, 0x79, 0x79, 2, kVexOnly | kW0, Imm::kNone, Feature::kAvx2),
    {2, 0x66, 0x82, 0x82, {Op::kInvalidatePcid, 0, 0, Imm::kNone, 16, kModrm | kLegacy | kMemoryOnly}},
    {2,
     0x66,
     0x8c,
     0x8c,
     {Op::kMaskMove, kVr, 0, Imm::kNone, kFull, kModrm | kVvvv | kVexOnly | kMemoryOnly, Feature::kAvx2}},
    {2,
     0x66,
     0x8e,
     0x8e,
     {Op::kMaskMove, kVr, 0, Imm::kNone, kFull, kModrm | kVvvv | kVexOnly | kMemoryOnly, Feature::kAvx2}},
    {2,
     0x66,
     0x90,
     0x93,
     {Op::kGather, kVr, 0, Imm::kNone, 0, kModrm | kVvvv | kVexOnly | kMemoryOnly, Feature::kAvx2}},
    op3(2, 0x66, 0x96, 0x98, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x99, 0x99, kHalf, kVexOnly, Imm::kNone, Feature::kFma),  // scalars: sizes by the decoder
    op3(2, 0x66, 0x9a, 0x9a, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x9b, 0x9b, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x9c, 0x9c, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x9d, 0x9d, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x9e, 0x9e, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0x9f, 0x9f, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xa6, 0xa8, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xa9, 0xa9, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xaa, 0xaa, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xab, 0xab, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xac, 0xac, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xad, 0xad, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xae, 0xae, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xaf, 0xaf, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xb6, 0xb8, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xb9, 0xb9, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xba, 0xba, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xbb, 0xbb, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xbc, 0xbc, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xbd, 0xbd, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xbe, 0xbe, kFull, kVexOnly, Imm::kNone, Feature::kFma),
    op3(2, 0x66, 0xbf, 0xbf, kHalf, kVexOnly, Imm::kNone, Feature::kFma),
    op2(2, 0x66, 0xdb, 0xdb, 16, kAl | kL0, Imm::kNone, Feature::kAes),
    op3(2, 0x66, 0xdc, 0xdf, 16, kAl | kL0, Imm::kNone, Feature::kAes),
    row(2, 0, 0xf0, kGv | kW, kGv | kR, kBySize, kLegacy | kMemoryOnly, Imm::kNone, Feature::kMovbe),
    row(2, 0x66, 0xf0, kGv | kW, kGv | kR, kBySize, kLegacy | kMemoryOnly, Imm::kNone, Feature::kMovbe),
    row(2, 0, 0xf1, kGv | kR, kGv | kW, kBySize, kLegacy | kMemoryOnly, Imm::kNone, Feature::kMovbe),
    row(2, 0x66, 0xf1, kGv | kR, kGv | kW, kBySize, kLegacy | kMemoryOnly, Imm::kNone, Feature::kMovbe),
    row(2, 0xf2, 0xf0, kGy | kX, kGb | kR, 1, kLegacy),  // CRC32
    row(2, 0xf2, 0xf1, kGy | kX, kGv | kR, kBySize, kLegacy),
    row(2, 0x66, 0xf6, kGy | kX, kGy | kR, kBySize, kLegacy | kFlags, Imm::kNone, Feature::kAdx),
    row(2, 0xf3, 0xf6, kGy | kX, kGy | kR, kBySize, kLegacy | kFlags, Imm::kNone, Feature::kAdx),
    row(2, 0, 0xf2, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead | kFlags, Imm::kNone,
        Feature::kBmi1),
    row(2, 0, 0xf3, 0, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvWrite | kFlags, Imm::kNone, Feature::kBmi1),
    row(2, 0, 0xf5, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead | kFlags, Imm::kNone,
        Feature::kBmi2),
    row(2, 0xf3, 0xf5, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead, Imm::kNone, Feature::kBmi2),
    row(2, 0xf2, 0xf5, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead, Imm::kNone, Feature::kBmi2),
    row(2, 0xf2, 0xf6, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvWrite | kReadsRdx, Imm::kNone,
        Feature::kBmi2),
    row(2, 0, 0xf7, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead | kFlags, Imm::kNone,
        Feature::kBmi1),
    row(2, 0x66, 0xf7, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead, Imm::kNone, Feature::kBmi2),
    row(2, 0xf3, 0xf7, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead, Imm::kNone, Feature::kBmi2),
    row(2, 0xf2, 0xf7, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0 | kVvvvRead, Imm::kNone, Feature::kBmi2),

    // --- 0F3A
    op2(3, 0x66, 0x00, 0x01, kFull, kVexOnly | kL1 | kW1, kI8, Feature::kAvx2),
    op3(3, 0x66, 0x02, 0x02, kFull, kVexOnly | kW0, kI8, Feature::kAvx2),
    op2(3, 0x66, 0x04, 0x05, kFull, kVexOnly | kW0, kI8),
    op3(3, 0x66, 0x06, 0x06, kFull, kVexOnly | kL1 | kW0, kI8),
    op2(3, 0x66, 0x08, 0x09, kFull, kAl, kI8),
    op3(3, 0x66, 0x0a, 0x0a, 4, 0, kI8),
    op3(3, 0x66, 0x0b, 0x0b, 8, 0, kI8),
    op3(3, 0x66, 0x0c, 0x0d, kFull, kAl, kI8),
    op3(3, 0x66, 0x0e, 0x0e, kFull, kAl | kL1Avx2, kI8),
    op3(3, 0x66, 0x0f, 0x0f, kFull, kAl | kL1Avx2 | kMmxToo, kI8),
    row(3, 0x66, 0x14, kVs, kGd | kW, 1, kL0, kI8),
    row(3, 0x66, 0x15, kVs, kGd | kW, 2, kL0, kI8),
    row(3, 0x66, 0x16, kVs, kGy | kW, kBySize, kL0, kI8),
    row(3, 0x66, 0x17, kVs, kGd | kW, 4, kL0, kI8),
    op3(3, 0x66, 0x18, 0x18, 16, kVexOnly | kL1 | kW0, kI8),
    store(3, 0x66, 0x19, 16, kVexOnly | kL1 | kW0, kI8),
    store(3, 0x66, 0x1d, kHalf, kVexOnly | kW0, kI8, Feature::kF16c),
    row(3, 0x66, 0x20, kVx, kGd | kR, 1, kVvvv | kL0, kI8),
    op3(3, 0x66, 0x21, 0x21, 4, kL0, kI8),
    row(3, 0x66, 0x22, kVx, kGy | kR, kBySize, kVvvv | kL0, kI8),
    op3(3, 0x66, 0x38, 0x38, 16, kVexOnly | kL1 | kW0, kI8, Feature::kAvx2),
    store(3, 0x66, 0x39, 16, kVexOnly | kL1 | kW0, kI8, Feature::kAvx2),
    op3(3, 0x66, 0x40, 0x40, kFull, kAl, kI8),
    op3(3, 0x66, 0x41, 0x41, kFull, kAl | kL0, kI8),
    op3(3, 0x66, 0x42, 0x42, kFull, kAl | kL1Avx2, kI8),
    op3(3, 0x66, 0x44, 0x44, 16, kAl | kL0, kI8, Feature::kPclmul),
    op3(3, 0x66, 0x46, 0x46, kFull, kVexOnly | kL1 | kW0, kI8, Feature::kAvx2),
    op3(3, 0x66, 0x4a, 0x4b, kFull, kVexOnly | kW0, kI8),
    op3(3, 0x66, 0x4c, 0x4c, kFull, kVexOnly | kW0 | kL1Avx2, kI8),
    row(3, 0x66, 0x60, kVs, kVs, 16, kL0 | kReadsRax | kReadsRdx | kFlags, kI8),
    row(3, 0x66, 0x61, kVs, kVs, 16, kL0 | kReadsRax | kReadsRdx | kWritesRcx | kFlags, kI8),
    row(3, 0x66, 0x62, kVs, kVs, 16, kL0 | kFlags, kI8),
    row(3, 0x66, 0x63, kVs, kVs, 16, kL0 | kWritesRcx | kFlags, kI8),
    op2(3, 0x66, 0xdf, 0xdf, 16, kAl | kL0, kI8, Feature::kAes),
    row(3, 0xf2, 0xf0, kGy | kW, kGy | kR, kBySize, kVexOnly | kL0, kI8, Feature::kBmi2),  // RORX
};

constexpr std::size_t prefix_index(std::uint8_t prefix) {
  switch (prefix) {
    case 0x66:
      return 1;
    case 0xf3:
      return 2;
    case 0xf2:
      return 3;
    default:
      return 0;
  }
}

// Row number + 1 by encoding (legacy, VEX), map, prefix and opcode.
using Index = std::array<std::array<std::array<std::array<std::uint8_t, 256>, 4>, 3>, 2>;
static_assert(std::size(kRows) < 255);

constexpr Index make_index() {
  Index index{};
  for (std::size_t i = 0; i < std::size(kRows); ++i) {
    const Row& r = kRows[i];
    for (std::size_t opcode = r.first; opcode <= r.last; ++opcode) {
      for (std::size_t vex = 0; vex < 2; ++vex) {
        const bool excluded = (r.spec.bits & (vex != 0 ? kLegacy : kVexOnly)) != 0;
        if (!excluded) {
          index[vex][r.map - 1U][prefix_index(r.prefix)][opcode] = static_cast<std::uint8_t>(i + 1);
        }
        if (vex == 0 && !excluded && (r.spec.bits & kMmxToo) != 0) {
          index[0][r.map - 1U][0][opcode] = static_cast<std::uint8_t>(i + 1);
        }
      }
    }
  }
  return index;
}
constinit const Index kIndex = make_index();

}  // namespace

const Spec* vector_spec(std::uint8_t map, std::uint8_t prefix, std::uint8_t opcode, bool vex) {
  const std::uint8_t at = kIndex[vex ? 1 : 0][map - 1U][prefix_index(prefix)][opcode];
  return at == 0 ? nullptr : &kRows[at - 1].spec;
}

}  // namespace wisp::soft::tables
