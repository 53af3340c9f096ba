if(NOT TARGET wisp_virtio_test_support)
  add_subdirectory(${CMAKE_SOURCE_DIR}/tests/virtio/support ${CMAKE_BINARY_DIR}/tests/virtio/support)
endif()
wisp_fuzz(vhost_user_answers SOURCES ${CMAKE_SOURCE_DIR}/fuzz/vhost_user_answers_fuzz.cpp
  USES virtio virtio_test_support)
