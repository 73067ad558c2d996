# nvcc is only a driver. What it calls and includes are parts of their own: since CUDA 13 also in the Windows
# installer, where who picks nvcc alone gets neither.

# mamba_check_cuda_parts(<version> <bin folder> <include folder>...)
function(mamba_check_cuda_parts version bin)
  string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" version "${version}")
  set(apt "${CMAKE_MATCH_1}-${CMAKE_MATCH_2}")
  cmake_path(GET bin PARENT_PATH root)

  set(parts "")
  set(files "")
  find_path(_mamba_host_config crt/host_config.h PATHS ${ARGN} NO_DEFAULT_PATH NO_CACHE)
  if(NOT _mamba_host_config)
    set(parts crt)
    set(files include/crt/host_config.h)
  endif()
  find_program(_mamba_cicc NAMES cicc PATHS "${root}/nvvm/bin" /usr/lib/nvidia-cuda-toolkit/bin
               NO_DEFAULT_PATH NO_CACHE)
  if(NOT _mamba_cicc)
    list(APPEND parts nvvm)
    list(APPEND files nvvm/bin/cicc)
  endif()
  if(NOT parts)
    return()
  endif()

  set(windows nvcc_${version})
  if(version VERSION_GREATER_EQUAL 13)
    list(TRANSFORM parts APPEND _${version} OUTPUT_VARIABLE windows)
  endif()
  list(TRANSFORM parts REPLACE "(.+)" "cuda-\\1-${apt}" OUTPUT_VARIABLE packages)
  list(JOIN files " and " files)
  list(JOIN windows " " windows)
  list(JOIN packages " " packages)
  message(FATAL_ERROR "CUDA ${version} at ${root} has nvcc but lacks ${files}. Install the missing part: on Windows "
                      "run CUDA's installer again and add ${windows} (or all of the compiler); on Linux, "
                      "apt install ${packages}.")
endfunction()
