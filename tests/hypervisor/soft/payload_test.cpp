// Small bare-metal programs on both executors: what single instructions cannot show, because it lies between
// them. Programs are bytes with the instructions beside them.
#include <atomic>
#include <chrono>
#include <thread>

#include "hypervisor/soft/payload_kit.h"

namespace wisp::soft {
namespace {

// A store to an absent page: the handler maps it, and the store happens.
TEST_P(Payload, PageFaultIsMendedAndTheStoreRunsAgain) {
  page(0x121000, 0);
  gate(14, kHandler);
  code(kCode, {0xb8, 0x78, 0x56, 0x34, 0x12,                       // mov eax, 0x12345678
               0xf9,                                               // stc
               0x89, 0x04, 0x25, 0x10, 0x10, 0x12, 0x00,           // mov [0x121010], eax
               0x0f, 0x92, 0xc3,                                   // setc bl
               0xf4});                                             // hlt
  code(kHandler, {0x50,                                            // push rax
                  0x0f, 0x20, 0xd0,                                // mov rax, cr2
                  0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x12, 0x00,  // mov [0x120000], rax
                  0x48, 0x8b, 0x44, 0x24, 0x08,                    // mov rax, [rsp + 8]: the error code
                  0x48, 0x89, 0x04, 0x25, 0x08, 0x00, 0x12, 0x00,  // mov [0x120008], rax
                  0x48, 0xc7, 0x04, 0x25, 0x08, 0x49, 0x00, 0x00, 0x07, 0x10, 0x12,
                  0x00,                                            // mov qword [0x4908], 0x121007
                  0x0f, 0x01, 0x3c, 0x25, 0x00, 0x10, 0x12, 0x00,  // invlpg [0x121000]
                  0x58,                                            // pop rax
                  0x48, 0x83, 0xc4, 0x08,                          // add rsp, 8
                  0x48, 0xcf});                                    // iretq
  run_to_halt();
  EXPECT_EQ(get(kData), 0x121010U);
  EXPECT_EQ(get(kData + 8), 2U);  // a write, to what is not there
  EXPECT_EQ(get(0x121010), 0x12345678U);
  EXPECT_EQ(cpu().gpr[kRbx] & 0xff, 1U);
  EXPECT_EQ(cpu().gpr[kRsp], kStack - 0x1000);
  EXPECT_EQ(get(kPt + 0x121 * 8) & 0x60, 0x60U);  // accessed and dirty
}

TEST_P(Payload, InstructionAcrossPagesFaultsOnTheSecond) {
  const std::uint64_t start = 0x13000 - 3;
  page(0x13000, 0);
  gate(14, kHandler);
  code(start, {0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,  // mov rax, 0x1122334455667788
               0xf4});
  code(kHandler, {0x48, 0x8f, 0x04, 0x25, 0x00, 0x00, 0x12, 0x00,  // pop [0x120000]: the error code
                  0x48, 0xc7, 0x04, 0x25, 0x98, 0x40, 0x00, 0x00, 0x03, 0x30, 0x01,
                  0x00,          // mov qword [0x4098], 0x13003
                  0x48, 0xcf});  // iretq
  cpu().rip = start;
  run_to_halt();
  EXPECT_EQ(get(kData), 0x10U);  // a fetch
  EXPECT_EQ(cpu().cr2, 0x13000U);
  EXPECT_EQ(cpu().gpr[kRax], 0x1122334455667788U);
  // Its second half changes: seen although nothing of the first page does.
  cpu().gpr[kRax] = 0;
  cpu().rip = start;
  cpu().segments[kCs].selector = kCode64;
  code(kCode, {0xc6, 0x04, 0x25, 0x06, 0x30, 0x01, 0x00, 0x99,  // mov byte [0x13006], 0x99
               0xe9, 0xf0, 0x2f, 0x00, 0x00});                  // jmp 0x12ffd
  cpu().rip = kCode;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 0x9922334455667788U);
}

TEST_P(Payload, CodeThatChangesItself) {
  code(kCode, {0xb9, 0x64, 0x00, 0x00, 0x00,        // mov ecx, 100
               0x31, 0xdb,                          // xor ebx, ebx
               0xb8, 0x01, 0x00, 0x00, 0x00,        // mov eax, 1: the 1 grows
               0x01, 0xc3,                          // add ebx, eax
               0xff, 0x05, 0xf4, 0xff, 0xff, 0xff,  // inc dword [rip - 12]
               0xff, 0xc9,                          // dec ecx
               0x75, 0xef,                          // jnz to the mov
               0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], 5050U);
}

// The very next instruction, in the same block.
TEST_P(Payload, ChangedCodeIsSeenByTheNextInstruction) {
  code(kCode, {0x31, 0xc0,                                // xor eax, eax
               0xc6, 0x05, 0x01, 0x00, 0x00, 0x00, 0xc8,  // mov byte [rip + 1], 0xc8
               0xff, 0xc0,                                // inc eax, which becomes dec eax
               0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 0xffffffffU);
}

TEST_P(Payload, StackOfTheInterruptTable) {
  gate(6, kHandler, 1);
  code(kCode, {0x0f, 0x0b});               // ud2
  code(kHandler, {0x48, 0x89, 0xe0,        // mov rax, rsp
                  0x48, 0x8b, 0x1c, 0x24,  // mov rbx, [rsp]
                  0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], kIst - 40);
  EXPECT_EQ(cpu().gpr[kRbx], kCode);
  EXPECT_EQ(get(kIst - 16), kStack - 0x1000);
}

TEST_P(Payload, DownToRingThreeAndBackByFaultCallAndGate) {
  cpu().msr.star = std::uint64_t{kCode64} << 32 | std::uint64_t{0x1b} << 48;  // SYSRET: CS 0x2b, SS 0x23
  cpu().msr.lstar = 0x14000;
  cpu().msr.sfmask = flag::kIf | flag::kCf;
  gate(0x80, kHandler, 0, 3);
  gate(14, kHandler + 0x100);
  code(kCode, {0x6a, 0x23,                                          // push 0x23
               0x68, 0x00, 0x00, 0x11, 0x00,                        // push 0x110000
               0x68, 0x03, 0x02, 0x00, 0x00,                        // push 0x203: IF, CF
               0x6a, 0x2b,                                          // push 0x2b
               0x68, 0x00, 0x00, 0x10, 0x00,                        // push 0x100000
               0x48, 0xcf});                                        // iretq
  code(kUserCode, {0xb8, 0x05, 0x00, 0x00, 0x00,                    // mov eax, 5
                   0x0f, 0x05,                                      // syscall: eax doubles
                   0x0f, 0x92, 0xc2,                                // setc dl: back from R11
                   0x48, 0x8b, 0x34, 0x25, 0x00, 0x00, 0x01, 0x00,  // mov rsi, [0x10000]: the kernel's
                   0xcd, 0x80});                                    // int 0x80
  code(0x14000, {0x0f, 0x92, 0xc3,                                  // setc bl: masked
                 0x01, 0xc0,                                        // add eax, eax
                 0x48, 0x0f, 0x07});                                // sysretq
  code(kHandler + 0x100, {0x5f,                                     // pop rdi: the error code
                          0x48, 0x83, 0x04, 0x24, 0x08,             // add qword [rsp], 8: past the load
                          0x48, 0xcf});                             // iretq
  code(kHandler, {0x48, 0x89, 0xe5, 0xf4});                         // mov rbp, rsp; hlt
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 10U);
  EXPECT_EQ(cpu().gpr[kRbx] & 0xff, 0U);
  EXPECT_EQ(cpu().gpr[kRdx] & 0xff, 1U);
  EXPECT_EQ(cpu().gpr[kRdi], 5U);  // a read by ring 3 of what is there
  EXPECT_EQ(cpu().gpr[kRbp], kStack - 40);
  EXPECT_EQ(get(kStack - 8), kUserData);
  EXPECT_EQ(get(kStack - 16), kUserStack);
  EXPECT_EQ(get(kStack - 32), kUserCode64);
  EXPECT_EQ(get(kStack - 40), kUserCode + 20);
  EXPECT_EQ(cpu().cpl, 0);
}

TEST_P(Payload, NoExecutionOfData) {
  gate(14, kHandler);
  page(kData, kData | 7 | 1ULL << 63);
  code(kCode, {0xb8, 0x00, 0x00, 0x12, 0x00,  // mov eax, 0x120000
               0xff, 0xe0});                  // jmp rax
  code(kHandler, {0x58, 0xf4});               // pop rax; hlt
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 0x11U);
  EXPECT_EQ(cpu().cr2, kData);
}

// STI lets one more instruction through; the interrupt comes right after it.
TEST_P(Payload, InterruptAfterTheShadowOfSti) {
  gate(0x40, kHandler);
  code(kCode, {0x31, 0xc0,  // xor eax, eax
               0xfb,        // sti
               0xff, 0xc0,  // inc eax
               0xff, 0xc0,  // inc eax
               0xf4});
  code(kHandler, {0x89, 0xc3,    // mov ebx, eax
                  0x48, 0xcf});  // iretq
  cpu().no_interrupt_waits = 0;
  ASSERT_EQ(run(), Processor::Stop::kAttention);
  EXPECT_EQ(cpu().rip, kCode + 5);
  ASSERT_TRUE(deliver_event(core(), {.vector = 0x40}, EventKind::kExternal));
  cpu().no_interrupt_waits = 1;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], 1U);
  EXPECT_EQ(cpu().gpr[kRax], 2U);
}

// However the block goes on behind STI: linked jumps lead round every look at an interrupt that waits.
TEST_P(Payload, InterruptBehindStiWhereverItsBlockGoes) {
  struct Case {
    const char* name;
    std::uint64_t offset;  // of the STI in its own pages
    std::vector<std::uint8_t> next;
    std::uint64_t to;  // where the processor stops with the interrupt
  };
  constexpr std::uint64_t kReturnTo = 0x2000;
  const std::vector<Case> cases{
      {"jump", 0, {0xeb, 0x10}, 0x13},
      {"conditional jump taken", 0, {0x74, 0x10}, 0x13},
      {"conditional jump not taken", 0, {0x75, 0x10}, 0x03},
      {"return", 0, {0xc3}, kReturnTo},
      {"last of its page", 0xfff, {0x90}, 0x1001},
      {"straight on", 0, {0x90}, 0x02},
      {"STAC, which ends it", 0, {0x0f, 0x01, 0xcb}, 0x04},
  };
  std::uint64_t pages = 0x50000;
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    pages += 0x4000;
    std::fill_n(ram_ + pages, 0x4000, std::uint8_t{0x90});
    ram_[pages + one.offset] = 0xfb;  // sti
    std::ranges::copy(one.next, ram_ + pages + one.offset + 1);
    code(pages + one.to, {0x90, 0x90, 0x90, 0x90, 0xeb, 0xfe});  // and round for ever
    for (int round = 0; round < 3; ++round) {
      // In the first rounds nothing waits, and jumps are linked; in the last an interrupt does.
      const bool waits = round == 2;
      cpu().rip = pages + one.offset;
      cpu().gpr[kRsp] = kStack - 0x1000;
      put(kStack - 0x1000, pages + kReturnTo);
      cpu().set_rflags(flag::kZf | 2);
      cpu().interrupt_shadow = 0;
      cpu().no_interrupt_waits = waits ? 0 : 1;
      cpu().run = kRunning;
      std::atomic<bool> done = false;
      std::thread stopper([this, &done] {
        for (int i = 0; i < 50 && !done.load(); ++i) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        cpu().run = 0;
      });
      EXPECT_EQ(run(), Processor::Stop::kAttention);
      const bool stopped_itself = cpu().run.load() != 0;
      done = true;
      stopper.join();
      if (waits) {
        EXPECT_TRUE(stopped_itself);
        EXPECT_EQ(cpu().rip, pages + one.to);
      }
    }
  }
}

// A jump to where no address is faults itself, with its own stack pointer.
TEST_P(Payload, JumpsToNowhereFaultThemselves) {
  struct Case {
    const char* name;
    std::vector<std::uint8_t> bytes;
  };
  const std::vector<Case> cases{{"ret", {0xc3}},
                                {"ret 16", {0xc2, 0x10, 0x00}},
                                {"jmp rax", {0xff, 0xe0}},
                                {"jmp [rsp]", {0xff, 0x24, 0x24}},
                                {"call rax", {0xff, 0xd0}},
                                {"call [rsp]", {0xff, 0x14, 0x24}}};
  gate(vec::kGp, kHandler, 1);
  code(kHandler, {0xf4});
  std::uint64_t at = kCode;
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    ram_[at] = 0x90;
    std::ranges::copy(one.bytes, ram_ + at + 1);
    cpu().rip = at;
    cpu().gpr[kRax] = std::uint64_t{1} << 62;
    cpu().gpr[kRsp] = kStack - 0x1000;
    put(kStack - 0x1000, std::uint64_t{1} << 62);
    run_to_halt();
    EXPECT_EQ(get(kIst - 48), 0U);  // the error code
    EXPECT_EQ(get(kIst - 40), at + 1);
    EXPECT_EQ(get(kIst - 16), kStack - 0x1000);
    at += 16;
  }
}

TEST_P(Payload, EveryInstructionIsAStepWithTheTrapFlag) {
  gate(1, kHandler);
  code(kCode, {0x9c,                                            // pushfq
               0x48, 0x81, 0x0c, 0x24, 0x00, 0x01, 0x00, 0x00,  // or qword [rsp], 0x100
               0x9d,                                            // popfq
               0x90, 0x90,                                      // nop; nop
               0xeb, 0x00,                                      // jmp to the next
               0x9c,                                            // pushfq
               0x48, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff,  // and qword [rsp], ~0x100
               0x9d,                                            // popfq
               0x90, 0xf4});
  code(kHandler, {0xff, 0xc3, 0x48, 0xcf});  // inc ebx; iretq
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], 6U);  // two NOPs, the jump, PUSHFQ, AND, POPFQ
}

// A user's trap flag does not stop the kernel before its first instruction, and the kernel's for the user
// does at once.
TEST_P(Payload, SystemCallsTrapByTheFlagTheyEndWith) {
  for (const bool masked : {true, false}) {
    SCOPED_TRACE(masked);
    make_machine();
    gate(1, kHandler, 1);
    gate(0x80, kHandler + 0x100, 0, 3);
    cpu().msr.star = std::uint64_t{kCode64} << 32 | std::uint64_t{0x1b} << 48;
    cpu().msr.lstar = 0x14000;
    cpu().msr.sfmask = masked ? std::uint64_t{flag::kTf} : 0;
    code(kCode, {0x49, 0xbb, 0x02, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // mov r11, 0x102: TF
                 0xb9, 0x00, 0x00, 0x10, 0x00,                                // mov ecx, 0x100000
                 0x48, 0x0f, 0x07});                                          // sysretq: the first
    code(kUserCode, {0x90,                                                    // nop: the second
                     0x0f, 0x05,                                              // syscall
                     0xcd, 0x80});                                            // int 0x80
    code(0x14000, {0x90,                                                      // nop
                   0x49, 0x81, 0xe3, 0xff, 0xfe, 0xff, 0xff,                  // and r11, ~0x100
                   0x48, 0x0f, 0x07});                                        // sysretq
    // Keeps where each came from.
    code(kHandler, {0x48, 0x8b, 0x04, 0x24,                          // mov rax, [rsp]
                    0x48, 0x89, 0x04, 0xdd, 0x00, 0x00, 0x12, 0x00,  // mov [0x120000 + rbx * 8], rax
                    0xff, 0xc3,                                      // inc ebx
                    0x48, 0xcf});                                    // iretq
    code(kHandler + 0x100, {0xf4});
    run_to_halt();
    std::vector<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < cpu().gpr[kRbx]; ++i) {
      seen.push_back(get(kData + i * 8));
    }
    std::vector<std::uint64_t> expected{kUserCode, kUserCode + 1};
    if (!masked) {
      expected.insert(expected.end(), {0x14000, 0x14001, 0x14008});
    }
    EXPECT_EQ(seen, expected);
  }
}

// HLT is an instruction like others: its trap ends the wait.
TEST_P(Payload, TheTrapBehindHltEndsIt) {
  gate(1, kHandler);
  cpu().set_rflags(2 | flag::kTf);
  code(kCode, {0xf4, 0x90});
  code(kHandler, {0x48, 0x8b, 0x04, 0x24,  // mov rax, [rsp]
                  0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], kCode + 1);
}

TEST_P(Payload, ABreakpointOnARepeatedInstructionHitsOnce) {
  gate(1, kHandler);
  cpu().dr[0] = kCode + 2;
  cpu().dr7 = 0x401;
  code(kCode, {0x90, 0x90, 0xf3, 0xaa,  // rep stosb
               0x90, 0xf4});
  code(kHandler, {0xff, 0xc3,                                            // inc ebx
                  0x48, 0x81, 0x4c, 0x24, 0x10, 0x00, 0x00, 0x01, 0x00,  // or qword [rsp + 16], 0x10000: RF
                  0x48, 0xcf});                                          // iretq
  cpu().gpr[kRcx] = 50;
  cpu().gpr[kRdi] = kData;
  cpu().gpr[kRax] = 7;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], 1U);
  EXPECT_EQ(ram_[kData + 49], 7);
  EXPECT_EQ(cpu().other_flags & flag::kRf, 0U);
}

TEST_P(Payload, ABreakpointIsOfTheLinearAddressWhateverTheSegmentsBase) {
  gate(1, kHandler);
  cpu().segments[kCs].base = 0x5000;  // which 64-bit code does not look at
  cpu().dr[0] = kCode + 1;
  cpu().dr7 = 0x401;
  code(kCode, {0x90, 0x90, 0xf4});
  code(kHandler, {0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().rip, kHandler + 1);
}

// Displacements that reach further than one of 32 bits from the page's start.
TEST_P(Payload, RelativeToTheEndsOfTheReach) {
  constexpr std::uint64_t kAt = kCode + 0xf00;
  code(kAt, {0x48, 0x8d, 0x05, 0xff, 0xff, 0xff, 0x7f,        // lea rax, [rip + 0x7fffffff]
             0x48, 0x8d, 0x1d, 0x00, 0x00, 0x00, 0x80,        // lea rbx, [rip - 0x80000000]
             0x67, 0x48, 0x8d, 0x15, 0x00, 0x00, 0x00, 0x80,  // lea rdx, [eip - 0x80000000]
             0xe9, 0xf0, 0xff, 0xff, 0x7f});                  // jmp + 0x7ffffff0
  gate(14, kHandler, 1);
  code(kHandler, {0x0f, 0x20, 0xd1,  // mov rcx, cr2
                  0xf4});
  cpu().rip = kAt;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], kAt + 7 + 0x7fffffff);
  EXPECT_EQ(cpu().gpr[kRbx], kAt + 14 - 0x80000000ULL);
  EXPECT_EQ(cpu().gpr[kRdx], (kAt + 22 - 0x80000000ULL) & 0xffffffff);
  EXPECT_EQ(cpu().gpr[kRcx], kAt + 27 + 0x7ffffff0);
}

// LOOP's own fault leaves its count alone.
TEST_P(Payload, LoopToWhereNoAddressCanBe) {
  constexpr std::uint64_t kLast = 0x7ffffffff000;
  constexpr std::uint64_t kTables = 0x40000;
  put(kPml4 + 255 * 8, kTables | 3);
  put(kTables + 511 * 8, (kTables + 0x1000) | 3);
  put(kTables + 0x1000 + 511 * 8, (kTables + 0x2000) | 3);
  put(kTables + 0x2000 + 511 * 8, kCode | 3);
  gate(13, kHandler, 1);
  code(kCode + 0xff0, {0x90, 0xe2, 0x70});       // nop; loop + 0x70
  code(kHandler, {0x48, 0x8b, 0x44, 0x24, 0x08,  // mov rax, [rsp + 8]
                  0xf4});
  cpu().rip = kLast + 0xff0;
  cpu().gpr[kRcx] = 5;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], kLast + 0xff1);
  EXPECT_EQ(cpu().gpr[kRcx], 5U);
}

// A fault of the first instruction of a block that another has jumped to, with flags alive across it.
TEST_P(Payload, DivideErrorKeepsWhatWasThere) {
  gate(0, kHandler);
  code(kCode, {0x31, 0xc9,                    // xor ecx, ecx
               0x31, 0xd2,                    // xor edx, edx
               0xb8, 0x07, 0x00, 0x00, 0x00,  // mov eax, 7
               0xeb, 0x00,                    // jmp to the next
               0xf7, 0xf1,                    // div ecx
               0xf4});
  code(kHandler, {0x48, 0x8b, 0x1c, 0x24,  // mov rbx, [rsp]
                  0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], kCode + 11);
  EXPECT_EQ(cpu().gpr[kRax], 7U);
}

// They are undefined; but both executors are one processor.
TEST_P(Payload, ADivisionLeavesTheFlagsThatTheHostsOwnLeaves) {
  std::uint64_t expected = 0x8d7;  // all set
  std::uint16_t dividend = 1;
  const std::uint8_t divisor = 0x20;
  asm volatile(
      "lea -128(%%rsp), %%rsp\n\tpushq %0\n\tpopfq\n\tidivb %2\n\tpushfq\n\tpopq %0\n\tlea 128(%%rsp), %%rsp"
      : "+r"(expected), "+a"(dividend)
      : "r"(divisor)
      : "cc", "memory");
  cpu().set_rflags(0x8d7);
  cpu().gpr[kRax] = 1;
  cpu().gpr[kRbx] = divisor << 8;
  code(kCode, {0xf6, 0xff,  // idiv bh
               0x9c, 0x59,  // pushfq; pop rcx
               0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 0x100U);
  EXPECT_EQ(cpu().gpr[kRcx] & flag::kArithmetic, expected & flag::kArithmetic);
}

// A page table entry changes under a loop that uses it: nothing old is used after INVLPG.
TEST_P(Payload, InvalidatedPageIsLookedUpAgain) {
  put(kData, std::uint64_t{1});
  put(kData + kPageSize, std::uint64_t{2});
  code(kCode, {0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x12, 0x00,  // mov rax, [0x120000]
               0x48, 0xc7, 0x04, 0x25, 0x00, 0x49, 0x00, 0x00, 0x07, 0x10, 0x12,
               0x00,                                            // mov qword [0x4900], 0x121007
               0x0f, 0x01, 0x3c, 0x25, 0x00, 0x00, 0x12, 0x00,  // invlpg [0x120000]
               0x48, 0x03, 0x04, 0x25, 0x00, 0x00, 0x12, 0x00,  // add rax, [0x120000]
               0xf4});
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRax], 3U);
}

TEST_P(Payload, EndlessLoopIsStoppedAtOnce) {
  code(kCode, {0xeb, 0xfe});  // jmp $
  cpu().run = kRunning;
  const std::jthread stopper([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    cpu().run = 0;
  });
  EXPECT_EQ(run(), Processor::Stop::kAttention);
  EXPECT_EQ(cpu().rip, kCode);
}

// The host is told of each turn of a spin loop, and of no other instruction that does nothing.
TEST_P(Payload, PausesAreTold) {
  code(kCode, {0xb9, 0x64, 0x00, 0x00, 0x00,  // mov ecx, 100
               0xf9,                          // stc
               0x90,                          // nop
               0xf3, 0x90,                    // pause
               0xf3, 0x41, 0x90,              // pause, with a prefix that it does not look at
               0x8d, 0x49, 0xff,              // lea ecx, [rcx - 1]
               0x67, 0xe3, 0x02,              // jecxz to the end
               0xeb, 0xf2,                    // jmp to nop
               0x0f, 0x92, 0xc3,              // setc bl
               0xf4});                        // hlt
  run_to_halt();
  EXPECT_EQ(pauses(), 200 / kPausesPerYield);
  EXPECT_EQ(cpu().gpr[kRcx], 0U);
  EXPECT_EQ(cpu().gpr[kRbx] & 0xff, 1U);
}

TEST_P(Payload, FaultWithoutAHandlerShutsDown) {
  cpu().idt.limit = 0;
  code(kCode, {0x0f, 0x0b});  // ud2
  EXPECT_EQ(run(), Processor::Stop::kShutdown);
}

INSTANTIATE_TEST_SUITE_P(Executors, Payload, each_executor(), executor_name);

}  // namespace
}  // namespace wisp::soft
