# Needs the driver's side of virtio, which the tests share.
if(NOT TARGET wisp_virtio_test_support)
  add_subdirectory(${CMAKE_SOURCE_DIR}/tests/virtio/support ${CMAKE_BINARY_DIR}/tests/virtio/support)
endif()
add_executable(bench_block_queue ${CMAKE_SOURCE_DIR}/bench/block_queue.cpp)
target_link_libraries(bench_block_queue PRIVATE wisp_virtio_test_support wisp_block wisp_flags)
