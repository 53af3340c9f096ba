wisp_fuzz(command_line SOURCES control_command_line_fuzz.cpp USES control machine)
wisp_fuzz(qmp SOURCES control_qmp_fuzz.cpp USES control machine)
target_link_libraries(fuzz_qmp PRIVATE nlohmann_json::nlohmann_json)
