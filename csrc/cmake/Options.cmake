# Every option of the project, and how all of it is compiled.

set(MAMBA_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO for ON where a usable nvcc is found")
set_property(CACHE MAMBA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MAMBA_CUDA_MAJOR "" CACHE STRING "Take a CUDA toolkit of this major version, 12 or 13; empty for any")
set(MAMBA_DEFAULT_CUDA_ARCHITECTURES native CACHE STRING
    "Architectures where neither CMAKE_CUDA_ARCHITECTURES nor TORCH_CUDA_ARCH_LIST says any")
option(MAMBA_CUDA_COMPRESS "Small kernels for wheels (nvcc --compress-mode=size)" OFF)
option(MAMBA_TORCH "The op library for torch, and the wheels" ${PROJECT_IS_TOP_LEVEL})
set(MAMBA_TORCH_DIR "" CACHE PATH "Folder of the torch package; empty to ask Python")
option(MAMBA_TESTS "The C++ tests" ${PROJECT_IS_TOP_LEVEL})
option(MAMBA_BENCH "The C++ benchmarks" ${PROJECT_IS_TOP_LEVEL})
option(MAMBA_WERROR "Warnings are errors" OFF)
set(MAMBA_SANITIZE "" CACHE STRING "Sanitizers for C++, as in address,undefined")
set(MAMBA_XSIMD_DIR "$ENV{MAMBA_XSIMD_DIR}" CACHE PATH
    "Folder that holds xsimd/xsimd.hpp; empty to find or fetch xsimd")
set(MAMBA_DIST_DIR "${PROJECT_SOURCE_DIR}/dist" CACHE PATH "Where target wheel leaves the wheels")
set(MAMBA_WHEEL_EXTRA_LIBS "" CACHE STRING
    "Op libraries of other builds that the wheel carries too, as that of the other CUDA major")

# The virtual environment that scripts/ make, where no other is active.
if(EXISTS "${PROJECT_SOURCE_DIR}/.venv" AND NOT DEFINED ENV{VIRTUAL_ENV} AND NOT DEFINED Python_ROOT_DIR)
  set(Python_ROOT_DIR "${PROJECT_SOURCE_DIR}/.venv")
endif()

# As torch is built: the release runtime in every configuration, so that both share one heap.
set(CMAKE_MSVC_RUNTIME_LIBRARY MultiThreadedDLL)
set(CMAKE_MSVC_DEBUG_INFORMATION_FORMAT Embedded)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()
