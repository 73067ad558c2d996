# nvcc compiles host code with the same compiler as the rest, and only with versions that its own header
# allows. Reading the bounds there keeps this right for toolkits to come.

if(CMAKE_CUDA_HOST_COMPILER OR DEFINED ENV{CUDAHOSTCXX} OR CMAKE_CUDA_FLAGS MATCHES "-allow-unsupported-compiler")
  return() # the user's own choice; nvcc judges it
endif()
if(NOT MSVC)
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()

# mamba_check_host_compiler(<header's text> <macro> <version> <cure>)
function(mamba_check_host_compiler header macro version cure)
  if(header MATCHES "\n#if ${macro} < ([0-9]+) \\|\\| ${macro} >= ([0-9]+)")
    set(lowest ${CMAKE_MATCH_1})
    set(end ${CMAKE_MATCH_2})
  elseif(header MATCHES "\n#if ${macro} > ([0-9]+)") # names the last good version only
    set(lowest 0)
    math(EXPR end "${CMAKE_MATCH_1} + 1")
  else()
    return()
  endif()
  if(version LESS lowest OR version GREATER_EQUAL end)
    message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} does not work with this compiler: ${macro} is ${version}, and it "
                        "takes from ${lowest} to below ${end}. ${cure}")
  endif()
endfunction()

list(GET CUDAToolkit_INCLUDE_DIRS 0 _include)
if(NOT EXISTS "${_include}/crt/host_config.h")
  message(FATAL_ERROR "${_include} has no crt/host_config.h: install all of the CUDA toolkit's compiler, the part named "
                      "crt included")
endif()
file(READ "${_include}/crt/host_config.h" _header)
if(MSVC)
  mamba_check_host_compiler("${_header}" _MSC_VER ${MSVC_VERSION}
    "Visual Studio 2026 (1950 and above) needs CUDA 13.2; with an older CUDA use preset x64-release-v143.")
elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  string(REGEX MATCH "^[0-9]+" _major "${CMAKE_CXX_COMPILER_VERSION}")
  mamba_check_host_compiler("${_header}" __GNUC__ ${_major}
    "Choose another with -DCMAKE_CXX_COMPILER=g++-<version>, or take a newer CUDA.")
endif()
