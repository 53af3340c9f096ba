wisp_fuzz(soft_decoder SOURCES ${CMAKE_SOURCE_DIR}/fuzz/soft_decoder_fuzz.cpp USES soft)
wisp_fuzz(soft_guest
  SOURCES ${CMAKE_SOURCE_DIR}/fuzz/soft_guest_fuzz.cpp ${CMAKE_SOURCE_DIR}/fuzz/soft_guest_code.cpp
    ${CMAKE_SOURCE_DIR}/fuzz/soft_guest_machine.cpp ${CMAKE_SOURCE_DIR}/fuzz/soft_guest_program.cpp
    ${CMAKE_SOURCE_DIR}/fuzz/soft_guest_traps.cpp
  USES soft hypervisor memory base)
