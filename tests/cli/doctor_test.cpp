#include "cli/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace wisp {
namespace {

using testing::HasSubstr;

// A host made of files in a directory of its own.
class FakeHost : public testing::Test {
 protected:
  FakeHost() {
    char name[] = "/tmp/wisp-host-XXXXXX";
    host_.root = ::mkdtemp(name);
    host_.path = "/usr/bin:/bin";
    host_.probe_kvm = [this] { return kvm_; };
    host_.probe_software_cpu = [this] { return software_cpu_; };
  }
  ~FakeHost() override { std::filesystem::remove_all(host_.root); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(host_.root + path).parent_path());
    std::ofstream(host_.root + path) << text;
  }
  Finding find(std::string_view name) {
    const auto findings = examine_host(host_);
    const auto found = std::ranges::find(findings, name, &Finding::name);
    EXPECT_NE(found, findings.end()) << name;
    return found != findings.end() ? *found : Finding{};
  }

  HostView host_;
  EngineReport kvm_{.usable = true, .summary = "runs on hardware", .advice = "not shown"};
  EngineReport software_cpu_{.usable = true, .summary = "can run machines", .advice = "not shown"};
};

TEST_F(FakeHost, AnEngineDecidesWhetherMachinesRun) {
  EXPECT_TRUE(can_run_machines(examine_host(host_)));
  EXPECT_EQ(find("kvm").advice, "");
  EXPECT_EQ(find("software CPU").state, FindingState::kGood);
  kvm_ = {.usable = false, .summary = "no /dev/kvm", .advice = "modprobe kvm"};
  EXPECT_TRUE(can_run_machines(examine_host(host_)));
  EXPECT_EQ(find("kvm").state, FindingState::kLimited);
  EXPECT_EQ(find("kvm").advice, "modprobe kvm");
  software_cpu_ = {.usable = false, .summary = "an old processor", .advice = "a newer one"};
  EXPECT_EQ(find("software CPU").state, FindingState::kLimited);
  EXPECT_FALSE(can_run_machines(examine_host(host_)));
  EXPECT_EQ(find("kvm").state, FindingState::kBad);
  EXPECT_EQ(find("kvm").advice, "modprobe kvm");
}

TEST_F(FakeHost, Memory) {
  EXPECT_EQ(find("memory").state, FindingState::kLimited);
  write("/proc/meminfo", "MemTotal:       9999999 kB\nMemAvailable:    2097152 kB\n");
  EXPECT_EQ(find("memory").state, FindingState::kGood);
  EXPECT_EQ(find("memory").found, "2048 MiB available");
  write("/proc/meminfo", "MemAvailable:    1024 kB\n");
  EXPECT_EQ(find("memory").state, FindingState::kLimited);
}

TEST_F(FakeHost, Hugepages) {
  EXPECT_EQ(find("hugepages").state, FindingState::kLimited);
  const std::string base = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  write(base + "nr_hugepages", "64\n");
  write(base + "free_hugepages", "0\n");
  EXPECT_EQ(find("hugepages").state, FindingState::kLimited);
  write(base + "free_hugepages", "3\n");
  EXPECT_EQ(find("hugepages").found, "3 of 64 pages of 2 MiB are free");
  EXPECT_EQ(find("hugepages").state, FindingState::kGood);
}

TEST_F(FakeHost, TapNeedsTheNodeAndTheCapability) {
  EXPECT_EQ(find("tap").state, FindingState::kLimited);
  EXPECT_THAT(find("tap").advice, HasSubstr("modprobe tun"));
  write("/dev/net/tun", "");
  write("/proc/self/status", "Name:\twisp\nCapEff:\t0000000000001000\n");
  EXPECT_EQ(find("tap").state, FindingState::kGood);
  write("/proc/self/status", "CapEff:\t0000000000000000\n");
  EXPECT_EQ(find("tap").state, FindingState::kLimited);
  EXPECT_THAT(find("tap").found, HasSubstr("CAP_NET_ADMIN"));
}

TEST_F(FakeHost, PasstIsLookedForInPath) {
  EXPECT_EQ(find("passt").state, FindingState::kLimited);
  write("/bin/passt", "#!/bin/sh\n");
  EXPECT_EQ(find("passt").state, FindingState::kLimited) << "not executable";
  std::filesystem::permissions(host_.root + "/bin/passt", std::filesystem::perms::owner_all);
  EXPECT_EQ(find("passt").found, "/bin/passt");
}

TEST_F(FakeHost, VhostIsTheDeviceNode) {
  EXPECT_THAT(find("vhost-vsock").advice, HasSubstr("modprobe vhost_vsock"));
  write("/dev/vhost-vsock", "");
  EXPECT_EQ(find("vhost-vsock").state, FindingState::kGood);
}

TEST_F(FakeHost, EverythingThatIsNotGoodSaysWhatToDo) {
  for (const Finding& finding : examine_host(host_)) {
    EXPECT_FALSE(finding.found.empty()) << finding.name;
    EXPECT_EQ(finding.state == FindingState::kGood, finding.advice.empty()) << finding.name;
  }
}

TEST(Doctor, TableAndJson) {
  const std::vector<Finding> findings{
      {.name = "kvm", .found = "runs", .advice = {}},
      {.name = "passt", .state = FindingState::kLimited, .found = "not found", .advice = "install \xff it"}};
  EXPECT_EQ(findings_table(findings),
            "kvm              ok       runs\n"
            "passt            limited  not found\n"
            "                          -> install \xff it\n"
            "Machines can run here.\n");
  const auto json = nlohmann::json::parse(findings_json(findings));
  EXPECT_EQ(json["machines"], true);
  EXPECT_EQ(json["findings"][1]["state"], "limited");
  EXPECT_FALSE(json["findings"][0].contains("advice"));
}

TEST(Doctor, TheRealHostIsExaminedWithoutATrace) {
  HostView host = real_host();
  ASSERT_TRUE(host.probe_kvm);
  host.probe_kvm = [] { return EngineReport{.usable = true, .summary = "not asked here", .advice = {}}; };
  const auto count = [] {
    const std::filesystem::directory_iterator open_files("/proc/self/fd");
    return std::distance(begin(open_files), end(open_files));
  };
  const auto before = count();
  EXPECT_EQ(examine_host(host).size(), 11U);
  EXPECT_EQ(count(), before);
}

TEST(Doctor, ArgumentsAndStatus) {
  HostView host = real_host();
  host.probe_kvm = [] { return EngineReport{.usable = false, .summary = "none", .advice = "get one"}; };
  host.probe_software_cpu = host.probe_kvm;
  testing::internal::CaptureStdout();
  EXPECT_EQ(run_doctor(std::vector<std::string>{"--json"}, host), 1);
  EXPECT_EQ(nlohmann::json::parse(testing::internal::GetCapturedStdout())["machines"], false);
  testing::internal::CaptureStderr();
  EXPECT_EQ(run_doctor(std::vector<std::string>{"--jsn"}, host), 2);
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "wisp: doctor: unknown argument '--jsn', expected --json\n");
}

}  // namespace
}  // namespace wisp
