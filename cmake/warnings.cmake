# Flags that every target of the tree is compiled with.
add_library(wisp_flags INTERFACE)
target_compile_options(wisp_flags INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast -Wcast-align
  -Wcast-qual -Wnon-virtual-dtor -Woverloaded-virtual -Wformat=2 -Wimplicit-fallthrough -Wundef
  -Wextra-semi -Wdouble-promotion -Werror
  -fno-strict-aliasing -fstack-protector-strong)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(wisp_flags INTERFACE
    -Wduplicated-cond -Wduplicated-branches -Wlogical-op -Wsuggest-override)
else()
  target_compile_options(wisp_flags INTERFACE -Wthread-safety -Wno-unknown-warning-option)
endif()
target_include_directories(wisp_flags INTERFACE ${CMAKE_SOURCE_DIR}/src)
target_compile_definitions(wisp_flags INTERFACE _FILE_OFFSET_BITS=64 _GNU_SOURCE)
target_link_libraries(wisp_flags INTERFACE Threads::Threads)
if(WISP_SANITIZE)
  target_compile_options(wisp_flags INTERFACE -fsanitize=${WISP_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer)
  target_link_options(wisp_flags INTERFACE -fsanitize=${WISP_SANITIZE})
elseif(CMAKE_BUILD_TYPE STREQUAL "Release" OR CMAKE_BUILD_TYPE STREQUAL "RelWithDebInfo")
  target_compile_definitions(wisp_flags INTERFACE _FORTIFY_SOURCE=2)
endif()
