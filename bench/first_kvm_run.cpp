// first_kvm_run COMMAND...: runs a VMM up to its first ioctl(KVM_RUN), prints the nanoseconds since its exec
// and those of CPU time that it spent in them, and ends it there. A seccomp filter hands just that call to us
// (SECCOMP_RET_USER_NOTIF); all others pass in the kernel.
// first_kvm_run --floor: makes this call and nothing else: what any static program takes to come so far.
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>

namespace {

constexpr std::uint32_t kKvmRun = 0xAE80;  // _IO(KVMIO, 0x80)
constexpr int kPatienceMs = 30000;

struct Times {
  std::int64_t wall = 0;
  std::int64_t cpu = 0;  // of the process
};

std::int64_t clock_ns(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

Times times_of(pid_t pid) {
  clockid_t clock{};
  clock_getcpuclockid(pid, &clock);
  return {clock_ns(CLOCK_MONOTONIC), clock_ns(clock)};
}

int install_filter() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kKvmRun, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{static_cast<unsigned short>(sizeof code / sizeof *code), code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    return -1;
  }
  return static_cast<int>(
      syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program));
}

bool send_fd(int socket, int fd) {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  return sendmsg(socket, &message, 0) == 1;
}

int receive_fd(int socket) {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(socket, &message, 0) != 1 || CMSG_FIRSTHDR(&message) == nullptr) {
    return -1;
  }
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
  return fd;
}

[[noreturn]] void child(int socket, char** command) {
  const int listener = install_filter();
  if (listener < 0 || !send_fd(socket, listener)) {
    std::perror("first_kvm_run: seccomp listener");
    _exit(3);
  }
  close(listener);
  // The parent waits for the time of the exec, which is therefore the last thing said.
  const Times start = times_of(0);
  if (write(socket, &start, sizeof start) != sizeof start) {
    _exit(3);
  }
  close(socket);
  execvp(command[0], command);
  std::perror(command[0]);
  _exit(127);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--floor") == 0) {
    return ioctl(-1, kKvmRun, 0) == 0 ? 0 : 1;
  }
  int pair[2];
  if (argc < 2 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    std::fprintf(stderr, "usage: first_kvm_run COMMAND...\n");
    return 2;
  }
  const pid_t pid = fork();
  if (pid < 0) {
    std::perror("fork");
    return 2;
  }
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    child(pair[1], argv + 1);
  }
  close(pair[1]);
  const int listener = receive_fd(pair[0]);
  Times start;
  int status = 1;
  if (listener >= 0 && read(pair[0], &start, sizeof start) == sizeof start) {
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, kPatienceMs) == 1 && (waiting.revents & POLLIN) != 0) {
      const Times now = times_of(pid);
      std::printf("%lld %lld\n", static_cast<long long>(now.wall - start.wall),
                  static_cast<long long>(now.cpu - start.cpu));
      status = 0;
    } else {
      std::fprintf(stderr, "first_kvm_run: the program ended, or %d ms passed, without KVM_RUN\n",
                   kPatienceMs);
    }
  }
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  return status;
}
