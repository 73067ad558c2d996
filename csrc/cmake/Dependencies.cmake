# Found on the machine first; fetched by commit otherwise; never vendored.

include(FetchContent)

# xsimd's API differs between majors, so its version is exact.
add_library(mamba_xsimd INTERFACE)
if(MAMBA_XSIMD_DIR)
  set(_config "${MAMBA_XSIMD_DIR}/xsimd/config/xsimd_config.hpp")
  if(NOT EXISTS "${_config}")
    message(FATAL_ERROR "MAMBA_XSIMD_DIR=${MAMBA_XSIMD_DIR} holds no xsimd/config/xsimd_config.hpp")
  endif()
  file(STRINGS "${_config}" _major REGEX "define XSIMD_VERSION_MAJOR")
  if(NOT _major MATCHES " 14$")
    message(FATAL_ERROR "MAMBA_XSIMD_DIR=${MAMBA_XSIMD_DIR} is not xsimd 14: ${_major}")
  endif()
  target_include_directories(mamba_xsimd SYSTEM INTERFACE "${MAMBA_XSIMD_DIR}")
else()
  message(STATUS "xsimd: an installed 14.1, else fetched by git; where no git host answers, unpack PyPI's wheel "
                 "pythran==0.19.0, which carries it, and give -DMAMBA_XSIMD_DIR=<its folder pythran>")
  FetchContent_Declare(xsimd
    GIT_REPOSITORY https://github.com/xtensor-stack/xsimd.git
    GIT_TAG 4050d947536137280ee9c01f2ec73fb3071e63f4 # 14.1.0
    SYSTEM
    FIND_PACKAGE_ARGS 14.1)
  FetchContent_MakeAvailable(xsimd)
  target_link_libraries(mamba_xsimd INTERFACE xsimd)
endif()

if(MAMBA_TESTS)
  set(gtest_force_shared_crt ON CACHE BOOL "" FORCE) # /MD, as everything here
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  set(BUILD_GMOCK OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googletest
    GIT_REPOSITORY https://github.com/google/googletest.git
    GIT_TAG 52eb8108c5bdec04579160ae17225d66034bd723 # 1.17.0
    SYSTEM
    FIND_PACKAGE_ARGS NAMES GTest)
  FetchContent_MakeAvailable(googletest)
endif()

if(MAMBA_BENCH)
  set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(benchmark
    GIT_REPOSITORY https://github.com/google/benchmark.git
    GIT_TAG 192ef10025eb2c4cdd392bc502f0c852196baa48 # 1.9.5
    SYSTEM
    FIND_PACKAGE_ARGS)
  FetchContent_MakeAvailable(benchmark)
endif()
