// Commands that tell about the machine as it is.
#include <sys/stat.h>

#include <array>
#include <charconv>

#include "control/command_line.h"
#include "control/qmp_commands.h"

namespace wisp {
namespace {

std::string vcpu_path(std::uint32_t index) {
  return fmt::format("/machine/unattached/device[{}]", index);
}

// CpuInstanceProperties of QEMU's schema. Clusters are told where there are some, as QEMU does: a client of
// x86 machines expects none.
Json vcpu_props(const VcpuInfo& vcpu) {
  Json props{{"socket-id", vcpu.socket_id},
             {"die-id", vcpu.die_id},
             {"core-id", vcpu.core_id},
             {"thread-id", vcpu.thread_in_core}};
  if (vcpu.topology.clusters > 1) {
    props["cluster-id"] = vcpu.cluster_id;
  }
  return props;
}

Json image_json(const BlockInfo& block) {
  return {{"filename", block.file},
          {"format", block.format},
          {"virtual-size", block.size},
          {"dirty-flag", false}};
}

// BlockDeviceInfo of QEMU's schema. Limits are on all requests together, so the members for one direction are
// zero, which means no limit; those for bursts are there only with a burst, as in QEMU.
Json inserted_json(const BlockInfo& block) {
  Json inserted{{"file", block.file},
                {"node-name", block.drive_id},
                {"ro", block.read_only},
                {"drv", block.format},
                {"backing_file_depth", 0},
                {"encrypted", false},
                {"detect_zeroes", "off"},
                {"bps", block.limits.bps},
                {"bps_rd", 0},
                {"bps_wr", 0},
                {"iops", block.limits.iops},
                {"iops_rd", 0},
                {"iops_wr", 0},
                {"write_threshold", 0},
                {"cache", {{"writeback", true}, {"direct", block.direct}, {"no-flush", false}}},
                {"image", image_json(block)}};
  if (block.limits.bps_burst != 0) {
    inserted["bps_max"] = block.limits.bps_burst;
  }
  if (block.limits.iops_burst != 0) {
    inserted["iops_max"] = block.limits.iops_burst;
  }
  return inserted;
}

}  // namespace

std::string_view run_state_name(RunState state) {
  switch (state) {
    case RunState::kCreated:
      return "prelaunch";
    case RunState::kRunning:
      return "running";
    case RunState::kPaused:
      return "paused";
    case RunState::kShutdown:
      return "shutdown";
  }
  return {};
}

// One without an id of its user's has "DRIVER#NUMBER".
std::string device_path(std::string_view id) {
  const std::size_t number = id.find('#');
  return number == std::string_view::npos
             ? fmt::format("/machine/peripheral/{}", id)
             : fmt::format("/machine/peripheral-anon/device[{}]", id.substr(number + 1));
}

// The version of the protocol is the one that StratoVirt tells, since clients judge by it what they may ask
// for; the program's own stands in "package".
Json version_json() {
  return {{"qemu", {{"micro", 1}, {"minor", 0}, {"major", 5}}},
          {"package", fmt::format("wisp-{}", program_version())}};
}

QmpReply qmp_query_status(QmpContext& context, const Json&) {
  const RunState state = context.machine.state();
  return Json{
      {"status", run_state_name(state)}, {"running", state == RunState::kRunning}, {"singlestep", false}};
}

QmpReply qmp_query_version(QmpContext&, const Json&) {
  return version_json();
}

QmpReply qmp_query_commands(QmpContext&, const Json&) {
  Json list = Json::array();
  for (const QmpCommand& command : qmp_commands()) {
    list.push_back({{"name", command.name}});
  }
  return list;
}

QmpReply qmp_query_events(QmpContext&, const Json&) {
  Json list = Json::array();
  for (const QmpEventInfo& event : qmp_events()) {
    list.push_back({{"name", event.name}});
  }
  return list;
}

QmpReply qmp_query_target(QmpContext&, const Json&) {
  return Json{{"arch", "x86_64"}};
}

QmpReply qmp_query_kvm(QmpContext& context, const Json&) {
  struct stat status{};  // not access(2), which the filter does not list
  return Json{{"enabled", context.machine.engine_name() == "kvm"},
              {"present", ::stat("/dev/kvm", &status) == 0}};
}

QmpReply qmp_query_name(QmpContext& context, const Json&) {
  const std::string& name = context.machine.config().name;
  return name.empty() ? Json::object() : Json{{"name", name}};
}

QmpReply qmp_query_uuid(QmpContext& context, const Json&) {
  return Json{{"UUID", context.uuid.empty() ? "00000000-0000-0000-0000-000000000000" : context.uuid}};
}

QmpReply qmp_query_machines(QmpContext&, const Json&) {
  return Json::array({{{"name", "microvm"},
                       {"is-default", true},
                       {"cpu-max", kMaxVcpus},
                       {"hotpluggable-cpus", false},
                       {"numa-mem-supported", false},
                       {"deprecated", false}}});
}

QmpReply qmp_query_cpus(QmpContext& context, const Json&) {
  const bool running = context.machine.state() == RunState::kRunning;
  Json list = Json::array();
  for (const VcpuInfo& vcpu : context.machine.vcpus()) {
    list.push_back({{"CPU", vcpu.index},
                    {"current", vcpu.index == 0},
                    {"halted", !running},
                    {"arch", "x86"},
                    {"qom_path", vcpu_path(vcpu.index)},
                    {"thread_id", vcpu.thread_id},
                    {"props", vcpu_props(vcpu)}});
  }
  return list;
}

QmpReply qmp_query_cpus_fast(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const VcpuInfo& vcpu : context.machine.vcpus()) {
    list.push_back({{"cpu-index", vcpu.index},
                    {"qom-path", vcpu_path(vcpu.index)},
                    {"thread-id", vcpu.thread_id},
                    {"target", "x86_64"},
                    {"props", vcpu_props(vcpu)}});
  }
  return list;
}

QmpReply qmp_query_hotpluggable_cpus(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const VcpuInfo& vcpu : context.machine.vcpus()) {
    list.push_back({{"type", "host-x86_64-cpu"},
                    {"vcpus-count", 1},
                    {"qom-path", vcpu_path(vcpu.index)},
                    {"props", vcpu_props(vcpu)}});
  }
  return list;
}

QmpReply qmp_query_block(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const BlockInfo& block : context.machine.blocks()) {
    Json entry{{"device", block.drive_id}, {"type", "unknown"}, {"locked", false},
               {"removable", false},       {"io-status", "ok"}, {"inserted", inserted_json(block)}};
    if (!block.device_id.empty()) {
      entry["qdev"] = device_path(block.device_id);
    }
    list.push_back(std::move(entry));
  }
  return list;
}

QmpReply qmp_query_named_block_nodes(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const BlockInfo& block : context.machine.blocks()) {
    list.push_back(inserted_json(block));
  }
  return list;
}

QmpReply qmp_query_blockstats(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const BlockInfo& block : context.machine.blocks()) {
    const BlockCounters& c = block.counters;
    // Times are not measured: their members are left out rather than zero.
    Json entry{{"device", block.drive_id},
               {"node-name", block.drive_id},
               {"stats",
                {{"rd_bytes", c.reads.bytes},
                 {"wr_bytes", c.writes.bytes},
                 {"unmap_bytes", c.discards.bytes},
                 {"rd_operations", c.reads.done},
                 {"wr_operations", c.writes.done},
                 {"flush_operations", c.flushes.done},
                 {"unmap_operations", c.discards.done},
                 {"failed_rd_operations", c.reads.failed},
                 {"failed_wr_operations", c.writes.failed},
                 {"failed_flush_operations", c.flushes.failed},
                 {"failed_unmap_operations", c.discards.failed},
                 {"wr_highest_offset", c.highest_written}}}};
    if (!block.device_id.empty()) {
      entry["qdev"] = device_path(block.device_id);
    }
    list.push_back(std::move(entry));
  }
  return list;
}

QmpReply qmp_query_chardev(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const ChardevInfo& chardev : context.machine.chardevs()) {
    list.push_back(
        {{"label", chardev.id}, {"filename", chardev.description}, {"frontend-open", chardev.connected}});
  }
  return list;
}

QmpReply qmp_query_iothreads(QmpContext& context, const Json&) {
  Json list = Json::array();
  for (const IothreadInfo& thread : context.machine.iothreads()) {
    // They wait in epoll and never poll busily.
    list.push_back({{"id", thread.id},
                    {"thread-id", thread.thread_id},
                    {"poll-max-ns", 0},
                    {"poll-grow", 0},
                    {"poll-shrink", 0},
                    {"aio-max-batch", 0}});
  }
  return list;
}

QmpReply qmp_query_balloon(QmpContext& context, const Json&) {
  const auto balloon = context.machine.balloon();
  if (!balloon) {
    return std::unexpected(
        QmpError{.error_class = QmpErrorClass::kDeviceNotActive, .text = balloon.error().message});
  }
  Json reply{{"actual", balloon->actual}};
  for (const auto& [name, value] : balloon->statistics) {
    reply["statistics"][name] = value;
  }
  return reply;
}

QmpReply qmp_query_memory_size(QmpContext& context, const Json&) {
  return Json{{"base-memory", context.machine.config().memory.size}, {"plugged-memory", 0}};
}

QmpReply qmp_empty_list(QmpContext&, const Json&) {
  return Json::array();
}

}  // namespace wisp
