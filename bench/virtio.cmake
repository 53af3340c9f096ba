# Needs the driver's side of virtio, which the tests share.
if(NOT TARGET wisp_virtio_test_support)
  add_subdirectory(${CMAKE_SOURCE_DIR}/tests/virtio/support ${CMAKE_BINARY_DIR}/tests/virtio/support)
endif()
add_executable(bench_virtio_queue ${CMAKE_SOURCE_DIR}/bench/virtio_queue.cpp)
target_link_libraries(bench_virtio_queue PRIVATE wisp_virtio_test_support wisp_flags)
