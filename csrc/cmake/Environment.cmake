# The field's environment variables. Each may also be given as -D<name>=<value>, which wins.

# Ninja rebuilds what configuring depends on before anything else: each build records the variables anew, and
# a record that differs configures again.
set(_names TORCH_CUDA_ARCH_LIST NVCC_THREADS MAX_JOBS MM_DISABLE_BF16 MM_DISABLE_HALF)
list(JOIN _names "," _comma_separated)
set(_record "${PROJECT_BINARY_DIR}/environment.txt")
set(_command "${CMAKE_COMMAND}" -DNAMES=${_comma_separated} "-DRECORD=${_record}" -P
             "${CMAKE_CURRENT_LIST_DIR}/RecordEnvironment.cmake")
execute_process(COMMAND ${_command} COMMAND_ERROR_IS_FATAL ANY)
if(CMAKE_GENERATOR MATCHES "Ninja" AND PROJECT_IS_TOP_LEVEL)
  add_custom_target(mamba_environment COMMAND ${_command} BYPRODUCTS "${_record}" VERBATIM
                    COMMENT "Comparing the environment with the configured one")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_record}")
endif()

# Sets each name to its value; empty and 0 mean off.
foreach(_name IN LISTS _names)
  if(NOT DEFINED CACHE{${_name}})
    set(${_name} "$ENV{${_name}}")
  endif()
  if(${_name} STREQUAL "0")
    set(${_name} "")
  endif()
endforeach()

foreach(_name IN ITEMS NVCC_THREADS MAX_JOBS)
  if(NOT "${${_name}}" MATCHES "^[0-9]*$")
    message(FATAL_ERROR "${_name} must be a number, got \"${${_name}}\"")
  endif()
endforeach()

set(MAMBA_WITH_F16 1)
if(MM_DISABLE_HALF)
  set(MAMBA_WITH_F16 0)
endif()
set(MAMBA_WITH_BF16 1)
if(MM_DISABLE_BF16)
  set(MAMBA_WITH_BF16 0)
endif()
