# TorchStable::TorchStable: torch's headers and torch_cpu, for the stable ABI of torch 2.10 and nothing else.
# find_package(Torch) would rewrite the CUDA flags and architectures, and link far more.

if(NOT MAMBA_TORCH_DIR)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  # Without importing it; and where pip's build isolation hides it, in the site-packages it will run from.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "\
import importlib.util, os, sysconfig
spec = importlib.util.find_spec('torch')
folder = os.path.dirname(spec.origin) if spec and spec.origin else ''
print(folder or os.path.join(sysconfig.get_path('purelib'), 'torch'))"
    OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  file(TO_CMAKE_PATH "${_torch}" _torch)
  set(_python " asked of ${Python_EXECUTABLE}")
else()
  set(_torch "${MAMBA_TORCH_DIR}")
  set(_python " given by MAMBA_TORCH_DIR")
endif()

find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h PATHS "${_torch}/include" NO_DEFAULT_PATH NO_CACHE
          NO_CMAKE_FIND_ROOT_PATH)
find_library(TorchStable_LIBRARY torch_cpu PATHS "${_torch}/lib" NO_DEFAULT_PATH NO_CACHE NO_CMAKE_FIND_ROOT_PATH)
if(NOT TorchStable_INCLUDE_DIR OR NOT TorchStable_LIBRARY)
  message(FATAL_ERROR "No torch 2.10 or newer in \"${_torch}\",${_python}. Install it (pip install torch); with pip's "
                      "build isolation it stays hidden unless you add --no-build-isolation; or give "
                      "-DMAMBA_TORCH_DIR=<folder of the torch package>; or build without it, -DMAMBA_TORCH=OFF.")
endif()
message(STATUS "Torch: ${_torch}")

add_library(TorchStable::TorchStable INTERFACE IMPORTED GLOBAL)
target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
target_compile_definitions(TorchStable::TorchStable INTERFACE
  TORCH_TARGET_VERSION=0x020a000000000000ULL TORCH_STABLE_ONLY)
target_link_libraries(TorchStable::TorchStable INTERFACE "${TorchStable_LIBRARY}")
set(TorchStable_FOUND TRUE)
