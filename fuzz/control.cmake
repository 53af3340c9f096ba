wisp_fuzz(command_line SOURCES control_command_line_fuzz.cpp USES control)
wisp_fuzz(qmp SOURCES control_qmp_fuzz.cpp USES control)
target_link_libraries(fuzz_qmp PRIVATE nlohmann_json::nlohmann_json)
