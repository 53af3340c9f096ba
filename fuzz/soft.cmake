wisp_fuzz(soft_decoder SOURCES ${CMAKE_SOURCE_DIR}/fuzz/soft_decoder_fuzz.cpp USES soft)
