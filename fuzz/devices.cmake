wisp_fuzz(devices_registers SOURCES devices_registers_fuzz.cpp USES devices memory base)
