// compute [SECONDS] [KIND...]: small programs that measure a processor from user mode, each doing one thing.
// Static and self-contained, so that the same instructions run on a host and in its guests, whatever CPUID
// says there.
//
// Prints `KIND NANOSECONDS CHECKSUM` for each kind: the time of one operation and what it computed. The time
// is the best of 40 windows of at least SECONDS (0.005) each, fewer where an operation takes long: a window
// that short is often free of what else the host does, and is long enough for a tick of the guest's own
// timer. A kind does a fixed number of operations from a fixed state, over and over, and must give the same
// sum each time: `KIND WRONG ...` where it does not. Before and after, `clock NANOSECONDS`, by which an
// observer can tell whether a guest's clock runs as fast as his own.
#define _GNU_SOURCE
#include <emmintrin.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { kWindows = 40, kFewestWindows = 3, kArenaSize = 4 << 20, kPageSize = 4096 };

// Memory for a kind's data, fresh for each, so that it does not matter which ran before.
static unsigned char* arena;

static void die(const char* what) {
  perror(what);
  exit(2);
}

static int64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static uint64_t xorshift(uint64_t x) {
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

static uint64_t mix(uint64_t sum, uint64_t value) {
  return (sum ^ value) * UINT64_C(0x9E3779B97F4A7C15) + 1;
}

static void fill(void* memory, size_t size, uint64_t seed) {
  unsigned char* bytes = memory;
  for (size_t i = 0; i < size; ++i) {
    seed = xorshift(seed);
    bytes[i] = (unsigned char)(seed >> 32);
  }
}

// A sum of words far apart: reading all would take as long as what is measured.
static uint64_t sample(const unsigned char* memory, size_t size) {
  uint64_t sum = 0;
  for (size_t at = 0; at < size; at += size / 16 + 8) {
    uint64_t word;
    memcpy(&word, memory + at, sizeof word);
    sum = mix(sum, word);
  }
  return sum;
}

// --- An integer loop in registers
// -------------------------------------------------------------------------------------

static uint64_t run_xorshift(void) {
  uint64_t x = 88172645463325252U;
  uint64_t sum = 0;
  for (int i = 0; i < 1 << 16; ++i) {
    x = xorshift(x);
    sum += x >> (x & 7);
  }
  return sum;
}

// --- CRC-32 of 1 KiB by table
// -----------------------------------------------------------------------------------------

enum { kCrcSize = 1024, kCrcOps = 64 };

static void set_up_crc(void) {
  uint32_t* table = (uint32_t*)arena;
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) {
      value = (value >> 1) ^ ((value & 1) != 0 ? 0xEDB88320U : 0);
    }
    table[i] = value;
  }
  fill(arena + 1024, kCrcSize, 1);
}

static uint64_t run_crc(void) {
  const uint32_t* table = (const uint32_t*)arena;
  const unsigned char* data = arena + 1024;
  uint32_t crc = 0xFFFFFFFFU;
  for (int op = 0; op < kCrcOps; ++op) {
    for (int i = 0; i < kCrcSize; ++i) {
      crc = (crc >> 8) ^ table[(crc ^ data[i]) & 0xFF];
    }
  }
  return crc;
}

// --- A block of SHA-256
// -----------------------------------------------------------------------------------------------

enum { kShaOps = 256 };

static uint32_t rotate(uint32_t value, int count) {
  return value >> count | value << (32 - count);
}

static void set_up_sha(void) {
  fill(arena, 64 * 4 + 64, 2);
}

__attribute__((noinline)) static void sha_block(uint32_t state[8], const unsigned char* block,
                                                const uint32_t* k) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    uint32_t word;
    memcpy(&word, block + 4 * i, sizeof word);
    w[i] = __builtin_bswap32(word);
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; ++i) {
    const uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + k[i] + w[i];
    const uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  state[0] += a;
  state[1] += b;
  state[2] += c;
  state[3] += d;
  state[4] += e;
  state[5] += f;
  state[6] += g;
  state[7] += h;
}

static uint64_t run_sha(void) {
  uint32_t state[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (int op = 0; op < kShaOps; ++op) {
    sha_block(state, arena + 64 * 4, (const uint32_t*)arena);
  }
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) {
    sum = mix(sum, state[i]);
  }
  return sum;
}

// --- Copies of 64 KiB: by SSE2, as a C library without AVX does, and by REP MOVSB
// -------------------------------------

enum { kCopySize = 64 << 10, kCopyOps = 16 };

static void set_up_copy(void) {
  fill(arena, 2 * kCopySize, 3);
}

__attribute__((noinline)) static void copy_sse2(unsigned char* to, const unsigned char* from, size_t size) {
  for (size_t at = 0; at < size; at += 64) {
    const __m128i a = _mm_loadu_si128((const __m128i*)(from + at));
    const __m128i b = _mm_loadu_si128((const __m128i*)(from + at + 16));
    const __m128i c = _mm_loadu_si128((const __m128i*)(from + at + 32));
    const __m128i d = _mm_loadu_si128((const __m128i*)(from + at + 48));
    _mm_storeu_si128((__m128i*)(to + at), a);
    _mm_storeu_si128((__m128i*)(to + at + 16), b);
    _mm_storeu_si128((__m128i*)(to + at + 32), c);
    _mm_storeu_si128((__m128i*)(to + at + 48), d);
    // Keeps the compiler from calling the library's memcpy() instead.
    __asm__ volatile("" ::: "memory");
  }
}

__attribute__((noinline)) static void copy_rep(unsigned char* to, const unsigned char* from, size_t size) {
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

static uint64_t run_memcpy(void) {
  uint64_t sum = 0;
  for (int op = 0; op < kCopyOps; ++op) {
    copy_sse2(arena + 2 * kCopySize, arena + (op & 1) * kCopySize, kCopySize);
    sum = mix(sum, sample(arena + 2 * kCopySize, kCopySize));
  }
  return sum;
}

static uint64_t run_rep_movsb(void) {
  uint64_t sum = 0;
  for (int op = 0; op < kCopyOps; ++op) {
    copy_rep(arena + 2 * kCopySize, arena + (op & 1) * kCopySize, kCopySize);
    sum = mix(sum, sample(arena + 2 * kCopySize, kCopySize));
  }
  return sum;
}

// --- A product of 64x64 matrices of double, by SSE2
// -------------------------------------------------------------------

enum { kOrder = 64 };

static void set_up_matmul(void) {
  double* cells = (double*)arena;
  uint64_t x = 4;
  for (int i = 0; i < 2 * kOrder * kOrder; ++i) {
    x = xorshift(x);
    cells[i] = (double)(x >> 40) / 1024.0 - 8192.0;
  }
}

__attribute__((noinline)) static void multiply(double* out, const double* left, const double* right) {
  for (int i = 0; i < kOrder; ++i) {
    for (int j = 0; j < kOrder; j += 2) {
      _mm_storeu_pd(out + i * kOrder + j, _mm_setzero_pd());
      __asm__ volatile("" ::: "memory");
    }
    for (int k = 0; k < kOrder; ++k) {
      const __m128d factor = _mm_set1_pd(left[i * kOrder + k]);
      for (int j = 0; j < kOrder; j += 2) {
        const __m128d product = _mm_mul_pd(factor, _mm_loadu_pd(right + k * kOrder + j));
        _mm_storeu_pd(out + i * kOrder + j, _mm_add_pd(_mm_loadu_pd(out + i * kOrder + j), product));
      }
    }
  }
}

static uint64_t run_matmul(void) {
  double* cells = (double*)arena;
  double* out = cells + 2 * kOrder * kOrder;
  multiply(out, cells, cells + kOrder * kOrder);
  uint64_t sum = 0;
  for (int i = 0; i < kOrder * kOrder; i += 7) {
    uint64_t bits;
    memcpy(&bits, &out[i], sizeof bits);
    sum = mix(sum, bits);
  }
  return sum;
}

// --- Following pointers through 2 MiB, each in a cache line of its own
// ------------------------------------------------

enum { kLinks = (2 << 20) / 64 };

struct Link {
  struct Link* next;
  uint64_t value;
  uint64_t rest[6];
};

static void set_up_chase(void) {
  struct Link* links = (struct Link*)arena;
  uint32_t* order = (uint32_t*)(arena + (2 << 20));
  for (uint32_t i = 0; i < kLinks; ++i) {
    order[i] = i;
    links[i].value = i;
  }
  uint64_t x = 5;
  for (uint32_t i = kLinks - 1; i > 0; --i) {
    x = xorshift(x);
    const uint32_t other = (uint32_t)((x >> 20) % (i + 1));
    const uint32_t kept = order[i];
    order[i] = order[other];
    order[other] = kept;
  }
  for (uint32_t i = 0; i < kLinks; ++i) {
    links[order[i]].next = &links[order[(i + 1) % kLinks]];
  }
}

static uint64_t run_chase(void) {
  const struct Link* at = (const struct Link*)arena;
  uint64_t sum = 0;
  for (int i = 0; i < kLinks; ++i) {
    sum = sum * 3 + at->value;
    at = at->next;
  }
  return sum;
}

// --- qsort() of 4096 integers with a comparison by pointer
// ------------------------------------------------------------

enum { kSorted = 4096 };

static void set_up_qsort(void) {
  fill(arena, kSorted * sizeof(uint32_t), 6);
}

static int compare(const void* left, const void* right) {
  const uint32_t a = *(const uint32_t*)left;
  const uint32_t b = *(const uint32_t*)right;
  return (a > b) - (a < b);
}

static uint64_t run_qsort(void) {
  const uint32_t* from = (const uint32_t*)arena;
  uint32_t* to = (uint32_t*)arena + kSorted;
  for (int i = 0; i < kSorted; ++i) {
    to[i] = from[i];
  }
  qsort(to, kSorted, sizeof *to, compare);
  uint64_t sum = 0;
  for (int i = 0; i < kSorted; i += 16) {
    sum = mix(sum, to[i]);
  }
  return sum;
}

// --- fib(20) by calls
// -------------------------------------------------------------------------------------------------

__attribute__((noinline)) static unsigned fib(unsigned n) {
  return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t run_fib(void) {
  uint64_t sum = 0;
  for (unsigned op = 0; op < 4; ++op) {
    unsigned n = 20;
    __asm__ volatile("" : "+r"(n));
    sum += fib(n);
  }
  return sum;
}

// --- An interpreter of byte code with computed gotos; the time is that of one of its instructions
// ----------------------

enum { kTurns = 1024, kTurnLength = 16 };

static void set_up_dispatch(void) {
  // The last two of a turn are a decrement and the jump back.
  static const unsigned char program[] = {1, 2, 3, 1, 4, 5, 2, 6, 1, 3, 5, 4, 2, 6, 7, 8, 0};
  memcpy(arena, program, sizeof program);
}

__attribute__((noinline)) static uint64_t interpret(const unsigned char* program) {
  static const void* const kLabels[] = {&&halt,  &&add,      &&xor,       &&rotate, &&load,
                                        &&store, &&multiply, &&decrement, &&jump};
  uint64_t accumulator = 7;
  uint64_t other = 11;
  uint64_t turns = kTurns;
  uint64_t memory[4] = {1, 2, 3, 4};
  const unsigned char* at = program;
#define NEXT goto* kLabels[*at++]
  NEXT;
add:
  accumulator += other;
  NEXT;
  xor : accumulator ^= other >> 3;
  NEXT;
rotate:
  accumulator = accumulator << 5 | accumulator >> 59;
  NEXT;
load:
  other = memory[accumulator & 3];
  NEXT;
store:
  memory[other & 3] = accumulator;
  NEXT;
multiply:
  accumulator = accumulator * 5 + 1;
  NEXT;
decrement:
  --turns;
  NEXT;
jump:
  if (turns != 0) {
    at = program;
  }
  NEXT;
halt:
#undef NEXT
  return accumulator ^ memory[0] ^ memory[1] ^ memory[2] ^ memory[3];
}

static uint64_t run_dispatch(void) {
  return interpret(arena);
}

// --- What the kernel does
// ---------------------------------------------------------------------------------------------

enum { kCalls = 1024, kReads = 256, kPages = 256, kRounds = 64, kProcesses = 4 };

static uint64_t run_getppid(void) {
  const long parent = syscall(SYS_getppid);
  uint64_t same = 0;
  for (int i = 0; i < kCalls; ++i) {
    same += syscall(SYS_getppid) == parent;
  }
  return same;
}

static int zero_file;

static void set_up_read(void) {
  zero_file = open("/dev/zero", O_RDONLY | O_CLOEXEC);
  if (zero_file < 0) {
    die("/dev/zero");
  }
}

static uint64_t run_read(void) {
  uint64_t sum = 0;
  for (int i = 0; i < kReads; ++i) {
    arena[i] = 1;
    sum += (uint64_t)read(zero_file, arena, kPageSize) + arena[i];
  }
  return sum;
}

static void tear_down_read(void) {
  close(zero_file);
}

static uint64_t run_page_fault(void) {
  unsigned char* pages =
      mmap(NULL, kPages * kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || madvise(pages, kPages * kPageSize, MADV_NOHUGEPAGE) != 0) {
    die("mmap");
  }
  uint64_t sum = 0;
  for (int i = 0; i < kPages; ++i) {
    sum = mix(sum, pages[i * kPageSize + i]);
    pages[i * kPageSize] = (unsigned char)i;
  }
  for (int i = 0; i < kPages; ++i) {
    sum = mix(sum, pages[i * kPageSize]);
  }
  munmap(pages, kPages * kPageSize);
  return sum;
}

static int to_child[2];
static int from_child[2];

static void set_up_pipe(void) {
  if (pipe(to_child) != 0 || pipe(from_child) != 0) {
    die("pipe");
  }
  const pid_t pid = fork();
  if (pid < 0) {
    die("fork");
  }
  if (pid == 0) {
    close(to_child[1]);
    unsigned char byte;
    while (read(to_child[0], &byte, 1) == 1) {
      byte = (unsigned char)(byte * 3 + 1);
      if (write(from_child[1], &byte, 1) != 1) {
        break;
      }
    }
    _exit(0);
  }
}

static uint64_t run_pipe(void) {
  unsigned char byte = 1;
  for (int i = 0; i < kRounds; ++i) {
    if (write(to_child[1], &byte, 1) != 1 || read(from_child[0], &byte, 1) != 1) {
      die("pipe");
    }
  }
  return byte;
}

static void tear_down_pipe(void) {
  for (int i = 0; i < 2; ++i) {
    close(to_child[i]);
    close(from_child[i]);
  }
  wait(NULL);
}

static uint64_t status_of(pid_t pid) {
  int status = 0;
  if (pid < 0 || waitpid(pid, &status, 0) != pid) {
    die("a process");
  }
  return (uint64_t)status;
}

static uint64_t run_fork(void) {
  uint64_t sum = 0;
  for (int i = 0; i < kProcesses; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      _exit(3 + i);
    }
    sum = mix(sum, status_of(pid));
  }
  return sum;
}

// In a function of its own: what its caller keeps in registers is safe from the child, which runs on this
// stack.
__attribute__((noinline)) static pid_t start_program(char* const arguments[]) {
  char* const environment[] = {NULL};
  const pid_t pid = vfork();
  if (pid == 0) {
    execve("/proc/self/exe", arguments, environment);
    _exit(127);
  }
  return pid;
}

static uint64_t run_exec(void) {
  char* const arguments[] = {(char*)"compute", (char*)"--exit", NULL};
  uint64_t sum = 0;
  for (int i = 0; i < kProcesses; ++i) {
    sum = mix(sum, status_of(start_program(arguments)));
  }
  return sum;
}

// --- Measuring
// --------------------------------------------------------------------------------------------------------

struct Kind {
  const char* name;
  void (*set_up)(void);
  uint64_t (*run)(void);
  void (*tear_down)(void);
  int operations;  // of one run
  int is_system;
};

static const struct Kind kKinds[] = {
    {"xorshift", NULL, run_xorshift, NULL, 1 << 16, 0},
    {"crc-1k", set_up_crc, run_crc, NULL, kCrcOps, 0},
    {"sha-block", set_up_sha, run_sha, NULL, kShaOps, 0},
    {"memcpy-64k", set_up_copy, run_memcpy, NULL, kCopyOps, 0},
    {"rep-movsb-64k", set_up_copy, run_rep_movsb, NULL, kCopyOps, 0},
    {"matmul-64", set_up_matmul, run_matmul, NULL, 1, 0},
    {"chase-2m", set_up_chase, run_chase, NULL, kLinks, 0},
    {"qsort-4096", set_up_qsort, run_qsort, NULL, 1, 0},
    {"fib-20", NULL, run_fib, NULL, 4, 0},
    {"dispatch", set_up_dispatch, run_dispatch, NULL, kTurns* kTurnLength, 0},
    {"getppid", NULL, run_getppid, NULL, kCalls, 1},
    {"read-4k", set_up_read, run_read, tear_down_read, kReads, 1},
    {"page-fault", NULL, run_page_fault, NULL, kPages, 1},
    {"pipe", set_up_pipe, run_pipe, tear_down_pipe, kRounds, 1},
    {"fork", NULL, run_fork, NULL, kProcesses, 1},
    {"exec", NULL, run_exec, NULL, kProcesses, 1},
};
enum { kKindCount = sizeof kKinds / sizeof kKinds[0] };

static void print_clock(void) {
  printf("clock %lld\n", (long long)now_ns());
  fflush(stdout);
}

// With one CPU to run on, parent and child take turns as they do in a guest of one CPU.
static void stay_on_this_cpu(void) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)sched_getcpu(), &set);
  sched_setaffinity(0, sizeof set, &set);
}

static void measure(const struct Kind* kind, double least_ns) {
  arena = mmap(NULL, kArenaSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (arena == MAP_FAILED || madvise(arena, kArenaSize, MADV_NOHUGEPAGE) != 0) {
    die("mmap");
  }
  if (kind->set_up != NULL) {
    kind->set_up();
  }
  const uint64_t expected = kind->run();
  double best = 0;
  double spent = 0;
  long runs = 1;
  // Where one run takes longer than a window should, there are fewer.
  for (int window = -1; window < kWindows && (window < kFewestWindows || spent < 2 * kWindows * least_ns);) {
    const int64_t start = now_ns();
    for (long i = 0; i < runs; ++i) {
      const uint64_t sum = kind->run();
      if (sum != expected) {
        printf("%s WRONG %016llx after %016llx\n", kind->name, (unsigned long long)sum,
               (unsigned long long)expected);
        exit(1);
      }
    }
    const double ns = (double)(now_ns() - start);
    if (window < 0) {
      // Finds how many runs take long enough; these are not counted.
      if (ns >= least_ns) {
        window = 0;
      } else {
        const double factor = least_ns / (ns + 1) * 1.1;
        runs = (long)((double)runs * (factor < 10 ? factor : 10)) + 1;
      }
      continue;
    }
    spent += ns;
    const double each = ns / ((double)runs * kind->operations);
    best = window == 0 || each < best ? each : best;
    ++window;
  }
  printf("%s %.3f %016llx\n", kind->name, best, (unsigned long long)expected);
  fflush(stdout);
  if (kind->tear_down != NULL) {
    kind->tear_down();
  }
  munmap(arena, kArenaSize);
}

int main(int count, char** arguments) {
  if (count == 2 && strcmp(arguments[1], "--exit") == 0) {
    return 5;
  }
  double least_ns = 0.005e9;
  int first = 1;
  if (count > 1 && strtod(arguments[1], NULL) > 0) {
    least_ns = strtod(arguments[1], NULL) * 1e9;
    first = 2;
  }
  for (int i = first; i < count; ++i) {
    int known = 0;
    for (int k = 0; k < kKindCount; ++k) {
      known |= strcmp(arguments[i], kKinds[k].name) == 0;
    }
    if (!known) {
      fprintf(stderr, "compute: no kind '%s'; there are:", arguments[i]);
      for (int k = 0; k < kKindCount; ++k) {
        fprintf(stderr, " %s", kKinds[k].name);
      }
      fprintf(stderr, "\n");
      return 2;
    }
  }
  print_clock();
  for (int k = 0; k < kKindCount; ++k) {
    int wanted = first >= count;
    for (int i = first; i < count; ++i) {
      wanted |= strcmp(arguments[i], kKinds[k].name) == 0;
    }
    if (wanted) {
      if (kKinds[k].is_system) {
        stay_on_this_cpu();
      }
      measure(&kKinds[k], least_ns);
    }
  }
  print_clock();
  return 0;
}
