if(NOT TARGET wisp_virtio_test_support)
  add_subdirectory(${CMAKE_SOURCE_DIR}/tests/virtio/support ${CMAKE_BINARY_DIR}/tests/virtio/support)
endif()
wisp_fuzz(virtio_queue SOURCES ${CMAKE_SOURCE_DIR}/fuzz/virtio_queue_fuzz.cpp USES virtio virtio_test_support)
# One program per entry of tests/virtio/hostile_devices.cpp.
foreach(device rng balloon console)
  wisp_fuzz(virtio_${device}
    SOURCES ${CMAKE_SOURCE_DIR}/fuzz/virtio_device_fuzz.cpp ${CMAKE_SOURCE_DIR}/tests/virtio/hostile_devices.cpp
    USES virtio virtio_test_support)
  target_compile_definitions(fuzz_virtio_${device} PRIVATE WISP_FUZZ_DEVICE="${device}")
endforeach()
