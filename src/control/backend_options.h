// From key-value pairs to back ends and devices: what -drive, -netdev, -chardev and -device of the command
// line and blockdev-add, netdev_add, chardev-add and device_add of QMP have in common. Inside this room only.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "control/launch_config.h"
#include "control/option_text.h"
#include "machine/device_table.h"

namespace wisp {

// `pairs` hold the id and the options (not the kind). `what` names the source in errors.
[[nodiscard]] Result<BackendConfig> make_drive(std::vector<KeyValue> pairs, const DriverTables& tables,
                                               std::string_view what, std::vector<std::string>& warnings);
[[nodiscard]] Result<BackendConfig> make_netdev(std::string_view kind, std::vector<KeyValue> pairs,
                                                const DriverTables& tables, std::string_view what,
                                                std::vector<std::string>& warnings);
[[nodiscard]] Result<BackendConfig> make_chardev(std::string_view kind, std::vector<KeyValue> pairs,
                                                 const DriverTables& tables, std::string_view what,
                                                 std::vector<std::string>& warnings);
// Without an id the device has an empty one.
[[nodiscard]] Result<DeviceConfig> make_device(std::string_view driver, std::vector<KeyValue> pairs,
                                               const DriverTables& tables, std::string_view what,
                                               std::vector<std::string>& warnings);

// "unix:PATH,server,nowait" or "tcp:HOST:PORT,server,nowait".
[[nodiscard]] Result<QmpEndpoint> parse_qmp_endpoint(std::string_view text, std::string_view what);
// A socket chardev as an endpoint.
[[nodiscard]] Result<QmpEndpoint> qmp_endpoint_of(const BackendConfig& chardev, std::string_view what);

// Whether the machine that is described has what its devices name (drive=, netdev=, chardev=, rng=,
// iothread=), each only once where it cannot be shared, and ids are unique. Unused back ends get a warning.
[[nodiscard]] Result<void> check_references(const MachineConfig& machine, std::vector<std::string>& warnings);

}  // namespace wisp
