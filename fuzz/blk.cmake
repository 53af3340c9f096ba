if(NOT TARGET wisp_virtio_test_support)
  add_subdirectory(${CMAKE_SOURCE_DIR}/tests/virtio/support ${CMAKE_BINARY_DIR}/tests/virtio/support)
endif()
wisp_fuzz(blk SOURCES ${CMAKE_SOURCE_DIR}/fuzz/blk_fuzz.cpp USES virtio virtio_test_support)
