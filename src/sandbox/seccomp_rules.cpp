// The lists themselves. Each call stands here for a reason that a reader can check; a call that no thread of
// the kind makes any more is to be taken out.
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>

#include "sandbox/seccomp.h"

#define VIRTIO_RING_NO_LEGACY  // helpers that are no C++
#include <linux/vhost.h>
#undef VIRTIO_RING_NO_LEGACY

namespace wisp {
namespace {

constexpr std::uint64_t kLow32 = 0xffffffff;

// Requests are told apart by type and number alone: direction and struct size differ between headers.
constexpr std::uint64_t kIoctlNumberMask = 0xffff;
constexpr std::uint64_t request(std::uint64_t code) {
  return code & kIoctlNumberMask;
}

// By either form of the requests: it is the C library's choice.
constexpr std::uint64_t kGetTerminal2 = request(_IO('T', 0x2a));
constexpr std::uint64_t kSetTerminal2 = request(_IO('T', 0x2b));

// What a device asks of a file when the driver's register writes start, change or reset it.
constexpr auto kDeviceIoctls = std::to_array<std::uint64_t>({
    // Interrupts that it raises.
    request(KVM_IRQ_LINE),
    // A handler of deadly signals puts the terminal's mode back.
    request(TCGETS),
    request(TCSETS),
    kGetTerminal2,
    kSetTerminal2,
    // Taps: offloads and queues that the driver negotiated.
    request(TUNSETOFFLOAD),
    request(TUNSETQUEUE),
    // Block devices, with aio=off.
    request(BLKDISCARD),
    // vhost (linux/vhost.h).
    request(VHOST_SET_FEATURES),
    request(VHOST_SET_MEM_TABLE),
    request(VHOST_SET_LOG_BASE),
    request(VHOST_SET_VRING_NUM),
    request(VHOST_SET_VRING_ADDR),
    request(VHOST_SET_VRING_BASE),  // and VHOST_GET_VRING_BASE, which has the same number
    request(VHOST_SET_VRING_KICK),
    request(VHOST_SET_VRING_CALL),
    request(VHOST_SET_VRING_ERR),
    request(VHOST_NET_SET_BACKEND),
    request(VHOST_VSOCK_SET_RUNNING),
});
// And a vCPU thread: entering the guest, and where it stood when that failed.
constexpr auto kVcpuIoctls = [] {
  std::array<std::uint64_t, kDeviceIoctls.size() + 2> all{request(KVM_RUN), request(KVM_GET_REGS)};
  std::ranges::copy(kDeviceIoctls, all.begin() + 2);
  return all;
}();
constexpr auto kWorkerIoctls = std::to_array<std::uint64_t>(
    {request(BLKDISCARD), request(TCGETS), request(TCSETS), kGetTerminal2, kSetTerminal2});

constexpr std::array<std::uint64_t, 3> kMmapProtection = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
constexpr std::array<std::uint64_t, 1> kUnixSockets = {AF_UNIX};
constexpr std::array<std::uint64_t, 4> kTerminalMode = {request(TCGETS), request(TCSETS), kGetTerminal2,
                                                        kSetTerminal2};
// The name, and by vCPU threads of the software CPU that their sleeps end on time. That there be no new
// privileges stands before the filter of a thread that began under another's.
constexpr std::array<std::uint64_t, 3> kOwnThread = {PR_SET_NAME, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS};

// Allocator, locks, signals, time and leaving: every thread.
#define WISP_COMMON_RULES                                                                                   \
  {.number = SYS_futex}, {.number = SYS_brk}, {.number = SYS_munmap}, {.number = SYS_madvise},              \
      {.number = SYS_mremap},                                                                               \
      {.number = SYS_mmap, .argument = 2, .mask = kLow32, .values = kMmapProtection},                       \
      {.number = SYS_mprotect, .argument = 2, .mask = kLow32, .values = kMmapProtection},                   \
      {.number = SYS_rt_sigprocmask}, {.number = SYS_rt_sigreturn}, {.number = SYS_sigaltstack},            \
      {.number = SYS_restart_syscall}, {.number = SYS_sched_yield}, {.number = SYS_clock_gettime},          \
      {.number = SYS_gettimeofday}, {.number = SYS_clock_nanosleep}, {.number = SYS_exit},                  \
      {.number = SYS_exit_group}, {.number = SYS_read}, {.number = SYS_write}, {.number = SYS_close},       \
      {.number = SYS_getpid}, {.number = SYS_gettid}, {.number = SYS_tgkill}, {.number = SYS_rt_sigaction}, \
      {.number = SYS_set_robust_list}, {.number = SYS_rseq},                                                \
      {.number = SYS_prctl, .argument = 0, .mask = kLow32, .values = kOwnThread}, {                         \
    .number = SYS_getrandom                                                                                 \
  }

// Moving data for devices: files, sockets, terminals, taps. And how passt ended, where it did.
#define WISP_DATA_RULES                                                                                    \
  {.number = SYS_readv}, {.number = SYS_writev}, {.number = SYS_pread64}, {.number = SYS_pwrite64},        \
      {.number = SYS_preadv}, {.number = SYS_pwritev}, {.number = SYS_preadv2}, {.number = SYS_fdatasync}, \
      {.number = SYS_fallocate}, {.number = SYS_io_uring_enter}, {.number = SYS_recvmsg},                  \
      {.number = SYS_recvfrom}, {.number = SYS_sendmsg}, {.number = SYS_sendto}, {.number = SYS_shutdown}, \
      {.number = SYS_accept4}, {.number = SYS_connect},                                                    \
      {.number = SYS_socket, .argument = 0, .mask = kLow32, .values = kUnixSockets},                       \
      {.number = SYS_epoll_wait}, {.number = SYS_epoll_pwait}, {.number = SYS_epoll_ctl},                  \
      {.number = SYS_timerfd_settime}, {.number = SYS_timerfd_create}, {.number = SYS_eventfd2},           \
      {.number = SYS_fcntl}, {.number = SYS_poll}, {                                                       \
    .number = SYS_wait4                                                                                    \
  }

constexpr auto kMainRules = std::to_array<SyscallRule>({
    WISP_COMMON_RULES,
    WISP_DATA_RULES,
    // Hotplug and reset: opening back ends, changing KVM's slots, doorbells and routes, setting taps and
    // disks up.
    {.number = SYS_openat},
    {.number = SYS_newfstatat},
    {.number = SYS_fstat},
    {.number = SYS_statx},
    {.number = SYS_ioctl},
    {.number = SYS_io_uring_setup},
    {.number = SYS_io_uring_register},
    {.number = SYS_bind},
    {.number = SYS_listen},
    {.number = SYS_getsockname},
    {.number = SYS_getsockopt},
    {.number = SYS_setsockopt},
    // Pseudo-terminals: hearing of who opens one.
    {.number = SYS_inotify_init1},
    {.number = SYS_inotify_add_watch},
    // Threads of hot-added back ends, and filters of their own.
    {.number = SYS_seccomp},
    {.number = SYS_clone3},
    {.number = SYS_clone},
    {.number = SYS_sched_getaffinity},
    // Leaving: socket and pid files, helper processes.
    {.number = SYS_unlink},
    {.number = SYS_kill},
});

constexpr auto kVcpuRules = std::to_array<SyscallRule>({
    WISP_COMMON_RULES,
    WISP_DATA_RULES,
    {.number = SYS_ioctl, .argument = 1, .mask = kIoctlNumberMask, .values = kVcpuIoctls},
});

constexpr auto kIoRules = std::to_array<SyscallRule>({
    WISP_COMMON_RULES,
    WISP_DATA_RULES,
    {.number = SYS_ioctl, .argument = 1, .mask = kIoctlNumberMask, .values = kDeviceIoctls},
});

// What run_task() in block/io_engine.cpp calls.
constexpr auto kWorkerRules = std::to_array<SyscallRule>({
    WISP_COMMON_RULES,
    {.number = SYS_preadv},
    {.number = SYS_pwritev},
    {.number = SYS_fdatasync},
    {.number = SYS_fallocate},
    {.number = SYS_ioctl, .argument = 1, .mask = kIoctlNumberMask, .values = kWorkerIoctls},
});

constexpr auto kEngineRules = std::to_array<SyscallRule>({
    WISP_COMMON_RULES,
    // drain_eventfd(), and its way on Linux before 5.8.
    {.number = SYS_preadv2},
    {.number = SYS_poll},
    {.number = SYS_epoll_wait},
    {.number = SYS_epoll_pwait},
    {.number = SYS_epoll_ctl},
    {.number = SYS_timerfd_settime},
    {.number = SYS_ioctl, .argument = 1, .mask = kIoctlNumberMask, .values = kTerminalMode},
});

#undef WISP_COMMON_RULES
#undef WISP_DATA_RULES

}  // namespace

std::string_view thread_kind_name(ThreadKind kind) {
  switch (kind) {
    case ThreadKind::kMain:
      return "main";
    case ThreadKind::kVcpu:
      return "vcpu";
    case ThreadKind::kIo:
      return "io";
    case ThreadKind::kWorker:
      return "worker";
    case ThreadKind::kEngine:
      return "engine";
  }
  return "unknown";
}

std::span<const SyscallRule> seccomp_rules(ThreadKind kind) {
  switch (kind) {
    case ThreadKind::kMain:
      return kMainRules;
    case ThreadKind::kVcpu:
      return kVcpuRules;
    case ThreadKind::kIo:
      return kIoRules;
    case ThreadKind::kWorker:
      return kWorkerRules;
    case ThreadKind::kEngine:
      return kEngineRules;
  }
  return {};
}

}  // namespace wisp
