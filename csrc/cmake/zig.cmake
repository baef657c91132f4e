# Cross-compiles with zig, which brings compilers and libraries for other machines in one package:
#
#   pip install ziglang
#   cmake -S csrc -B build -DCMAKE_TOOLCHAIN_FILE=csrc/cmake/zig.cmake -DADVKD_TARGET=wasm32-wasi
#
# ADVKD_TARGET is a target of zig, such as wasm32-wasi or aarch64-linux-musl. ADVKD_ZIG is the
# command, by default `python3 -m ziglang`.
set(ADVKD_TARGET "" CACHE STRING "What zig compiles for")
set(ADVKD_ZIG "python3;-m;ziglang" CACHE STRING "The command of zig")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ADVKD_TARGET ADVKD_ZIG)

string(REGEX MATCH "^[a-z0-9_]+" CMAKE_SYSTEM_PROCESSOR "${ADVKD_TARGET}")
set(CMAKE_SYSTEM_NAME Generic)
if(ADVKD_TARGET MATCHES "linux")
  set(CMAKE_SYSTEM_NAME Linux)
elseif(ADVKD_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(ADVKD_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
endif()

# CMake calls a compiler by one path, so each tool of zig becomes a script.
list(JOIN ADVKD_ZIG " " zig)
foreach(tool IN ITEMS cc c++ ar ranlib)
  set(script "${CMAKE_BINARY_DIR}/zig-${tool}")
  set(target "")
  if(tool MATCHES "^c")
    set(target "-target ${ADVKD_TARGET}")
    if(CMAKE_SYSTEM_PROCESSOR STREQUAL x86_64)
      string(APPEND target " -mevex512")  # zig leaves it out of what -mavx512f means
    endif()
  endif()
  if(NOT EXISTS "${script}")
    file(WRITE "${script}" "#!/bin/sh\nexec ${zig} ${tool} ${target} \"$@\"\n")
    execute_process(COMMAND chmod +x "${script}")
  endif()
endforeach()
set(CMAKE_C_COMPILER "${CMAKE_BINARY_DIR}/zig-cc")
set(CMAKE_CXX_COMPILER "${CMAKE_BINARY_DIR}/zig-c++")
set(CMAKE_AR "${CMAKE_BINARY_DIR}/zig-ar")
set(CMAKE_RANLIB "${CMAKE_BINARY_DIR}/zig-ranlib")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
