// What a user reads where there is no KVM to use.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <csignal>
#include <string>

#include "hypervisor/kvm/vcpu_kicker.h"
#include "hypervisor/kvm_guest.h"

namespace wisp {
namespace {

using ::testing::HasSubstr;

std::string open_error(const std::string& path) {
  const auto opened = KvmHypervisor::open(path);
  return opened ? "" : opened.error().message;
}

TEST(KvmOpen, MissingDevice) {
  const std::string error = open_error("/nonexistent/kvm");
  EXPECT_THAT(error, HasSubstr("/nonexistent/kvm does not exist"));
  EXPECT_THAT(error, HasSubstr("kvm-intel or kvm-amd"));
  EXPECT_EQ(error.find('\n'), std::string::npos);
}

TEST(KvmOpen, NotKvm) {
  EXPECT_THAT(open_error("/dev/null"), HasSubstr("/dev/null is not KVM"));
  EXPECT_THAT(open_error("/"), HasSubstr("cannot open /"));
}

// The error that a process without rights gets, by a child that gives them up.
std::string error_without_rights(const std::string& path) {
  int ends[2] = {-1, -1};
  EXPECT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    if (::geteuid() == 0 &&
        (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0)) {
      ::_exit(1);
    }
    const std::string error = open_error(path);
    ::_exit(::write(ends[1], error.data(), error.size()) == static_cast<ssize_t>(error.size()) ? 0 : 1);
  }
  ::close(ends[1]);
  std::string text(4096, '\0');
  const ssize_t size = ::read(ends[0], text.data(), text.size());
  ::close(ends[0]);
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  text.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
  return text;
}

TEST(KvmOpen, NoPermissionNamesTheGroup) {
  char path[] = "/tmp/wisp-kvm-test-XXXXXX";
  const int fd = ::mkstemp(path);
  ASSERT_GE(fd, 0);
  ::close(fd);
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(path, 0, 0), 0);  // group root, which every /etc/group names
    ASSERT_EQ(::chmod(path, 0660), 0);
    EXPECT_THAT(error_without_rights(path),
                HasSubstr("belongs to group root; add the user to it (usermod -aG root"));
    ASSERT_EQ(::chown(path, 0, 54321), 0);
    EXPECT_THAT(error_without_rights(path), HasSubstr("group 54321"));
  }
  ASSERT_EQ(::chmod(path, 0), 0);
  EXPECT_THAT(error_without_rights(path), HasSubstr("its mode is 0000"));
  ::unlink(path);
}

using KvmOpenHere = KvmTest;

TEST_F(KvmOpenHere, TheKickSignalMayNotBeTaken) {
  struct sigaction other{};
  other.sa_handler = [](int) {};
  struct sigaction before{};
  ASSERT_EQ(::sigaction(kvm::VcpuKicker::signal_number(), &other, &before), 0);
  EXPECT_THAT(open_error("/dev/kvm"), HasSubstr("has another handler already"));
  ASSERT_EQ(::sigaction(kvm::VcpuKicker::signal_number(), &before, nullptr), 0);
  EXPECT_EQ(open_error("/dev/kvm"), "");
  EXPECT_EQ(open_error("/dev/kvm"), "");  // once more does no harm
}

TEST_F(KvmOpenHere, TheVmOutlivesTheHypervisor) {
  std::unique_ptr<Vm> vm;
  {
    auto hypervisor = must(KvmHypervisor::open());
    vm = must(hypervisor->create_vm({}));
  }
  auto vcpu = must(vm->create_vcpu(0));
  EXPECT_EQ(vcpu->id(), 0U);
  EXPECT_EQ(must(vcpu->regs()).rip, 0xfff0U);
}

}  // namespace
}  // namespace wisp
