# One target carries every flag; ours link it privately and it is never exported.
# No fast math of any kind, and contraction stays the compiler's default.

add_library(mamba_flags INTERFACE)

# Host compiler flags: to the compiler itself, and through nvcc.
function(_mamba_host_flags)
  foreach(flag IN LISTS ARGN)
    target_compile_options(mamba_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${flag}>"
                                                 "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${flag}>")
  endforeach()
endfunction()

function(_mamba_nvcc_flags)
  target_compile_options(mamba_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:${ARGN}>")
endfunction()

if(MSVC)
  _mamba_host_flags(/W4 /permissive- /Zc:__cplusplus /Zc:preprocessor /utf-8 /bigobj /EHsc)
  # an older msvcp140.dll, as Python installs it, lacks what the newer constexpr mutex relies on
  target_compile_definitions(mamba_flags INTERFACE NOMINMAX WIN32_LEAN_AND_MEAN
                                                   _DISABLE_CONSTEXPR_MUTEX_CONSTRUCTOR)
else()
  # the wheel's bytes must not depend on where it was built
  _mamba_host_flags(-Wall -Wextra -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=)
  if(WIN32)
    target_compile_definitions(mamba_flags INTERFACE NOMINMAX WIN32_LEAN_AND_MEAN)
  endif()
endif()

if(MAMBA_WERROR)
  if(MSVC)
    _mamba_host_flags(/WX)
  else()
    _mamba_host_flags(-Werror)
  endif()
  _mamba_nvcc_flags(-Werror=all-warnings)
endif()

if(MAMBA_SANITIZE)
  if(MSVC)
    _mamba_host_flags(/fsanitize=${MAMBA_SANITIZE})
  else()
    target_compile_options(mamba_flags INTERFACE
      "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MAMBA_SANITIZE};-fno-sanitize-recover=all;-fno-omit-frame-pointer>")
    target_link_options(mamba_flags INTERFACE -fsanitize=${MAMBA_SANITIZE})
  endif()
endif()

if(MAMBA_CUDA_COMPRESS)
  _mamba_nvcc_flags(--compress-mode=size)
endif()
if(NVCC_THREADS)
  _mamba_nvcc_flags(--threads=${NVCC_THREADS})
endif()
if(MAX_JOBS) # the pool that the CUDA sources compile in
  set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${MAX_JOBS})
endif()
