# nvcc compiles host code with the same compiler as the rest, and only with versions that its own header
# allows. Reading the bounds there keeps this right for toolkits to come.

# The release of Visual Studio that a compiler came with.
function(_mamba_visual_studio out msc_ver)
  if(msc_ver GREATER_EQUAL 1960)
    set(name "after 2026")
  elseif(msc_ver GREATER_EQUAL 1950)
    set(name 2026)
  elseif(msc_ver GREATER_EQUAL 1930)
    set(name 2022)
  elseif(msc_ver GREATER_EQUAL 1920)
    set(name 2019)
  elseif(msc_ver GREATER_EQUAL 1910)
    set(name 2017)
  else()
    set(name "before 2017")
  endif()
  set(${out} "${name}" PARENT_SCOPE)
endfunction()

function(_mamba_check_visual_studio header)
  if(NOT header MATCHES "#if _MSC_VER < ([0-9]+) \\|\\| _MSC_VER >= ([0-9]+)")
    return()
  endif()
  set(lowest ${CMAKE_MATCH_1})
  set(end ${CMAKE_MATCH_2})
  if(MSVC_VERSION GREATER_EQUAL lowest AND MSVC_VERSION LESS end)
    return()
  endif()
  math(EXPR highest "${end} - 1")
  _mamba_visual_studio(from ${lowest})
  _mamba_visual_studio(to ${highest})
  _mamba_visual_studio(name ${MSVC_VERSION})
  if(MSVC_VERSION LESS lowest)
    set(cure "Install Visual Studio ${to}.")
  else()
    set(cure "Use a newer CUDA.")
    if(MSVC_VERSION LESS 1960) # the bound of CUDA 13.2
      set(cure "Use CUDA >= 13.2.")
    endif()
    if(end GREATER 1944)
      string(REPLACE "Use" "Use preset x64-release-v143 or" cure "${cure}")
      string(APPEND cure " That preset's compiler, 14.44 of Visual Studio 2022, is also a component of 2026; in a "
                         "prompt, vcvarsall.bat x64 -vcvars_ver=14.44 loads it, as python scripts/test.py does.")
    endif()
  endif()
  message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} accepts Visual Studio ${from} to ${to} (_MSC_VER from ${lowest} "
                      "to below ${end}); you have ${name} (${MSVC_VERSION}, ${CMAKE_CXX_COMPILER}). ${cure}")
endfunction()

# mamba_check_host_compiler's part for g++ and clang++, whose lowest versions no C++17 compiler falls below.
function(_mamba_check_major command highest)
  string(REGEX MATCH "^[0-9]+" major "${CMAKE_CXX_COMPILER_VERSION}")
  if(major GREATER highest)
    message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} accepts ${command} up to ${highest}; you have ${major} "
                        "(${CMAKE_CXX_COMPILER}). Choose another with -DCMAKE_CXX_COMPILER=${command}-${highest}, or "
                        "take a newer CUDA.")
  endif()
endfunction()

# mamba_check_host_compiler(<text of the toolkit's crt/host_config.h>)
function(mamba_check_host_compiler header)
  if(MSVC)
    _mamba_check_visual_studio("${header}")
  elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND header MATCHES "#if __GNUC__ > ([0-9]+)")
    _mamba_check_major(g++ ${CMAKE_MATCH_1})
  elseif(CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND header MATCHES
         "#if defined\\(__clang__\\) &&[^\n]*[\r\n]+#if \\(__clang_major__ >= ([0-9]+)\\)")
    math(EXPR highest "${CMAKE_MATCH_1} - 1")
    _mamba_check_major(clang++ ${highest})
  endif()
endfunction()

if(CMAKE_CUDA_HOST_COMPILER OR DEFINED ENV{CUDAHOSTCXX} OR CMAKE_CUDA_FLAGS MATCHES "-allow-unsupported-compiler")
  return() # the user's own choice; nvcc judges it
endif()
if(NOT MSVC)
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
find_file(_mamba_header crt/host_config.h PATHS ${CUDAToolkit_INCLUDE_DIRS} NO_DEFAULT_PATH NO_CACHE)
file(READ "${_mamba_header}" _mamba_header)
mamba_check_host_compiler("${_mamba_header}")
