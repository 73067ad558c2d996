# From what people write to what CMake wants. Needs no project: the tests run it in cmake -P. python/mamba_ssm/cli/doctor
# tells users what their list comes to; tests compare the two.

set(MAMBA_OLDEST_ARCHITECTURE 75)
set(_mamba_name_wheel 75 80 86 89 90 100 120)
set(_mamba_name_common ${_mamba_name_wheel})

# Torch's families (torch.utils.cpp_extension), each with PTX of its newest except those of boards.
set(_mamba_name_turing 75)
set(_mamba_name_ampere 80 86)
set(_mamba_name_ampere+tegra 87)
set(_mamba_name_ada 89)
set(_mamba_name_hopper 90)
set(_mamba_name_blackwell 100 103 120 121)
set(_mamba_name_blackwell+tegra 110)
foreach(_old IN ITEMS kepler kepler+tesla maxwell maxwell+tegra pascal volta volta+tegra)
  set(_mamba_name_${_old} "")
endforeach()

# 8.6, 86, sm_86, 86-real -> 86-real; 8.6+PTX -> 86; compute_86, 86-virtual -> 86-virtual; else nothing.
function(_mamba_parse_number out word)
  set(${out} "" PARENT_SCOPE)
  if(NOT word MATCHES "^(sm_|compute_)?([0-9]+)(\\.([0-9]))?([af]?)(\\+ptx|-real|-virtual)?$")
    return()
  endif()
  set(prefix "${CMAKE_MATCH_1}")
  set(number "${CMAKE_MATCH_2}${CMAKE_MATCH_4}${CMAKE_MATCH_5}")
  set(suffix "${CMAKE_MATCH_6}")
  if(prefix STREQUAL "compute_")
    set(suffix -virtual)
  elseif(suffix STREQUAL "+ptx")
    set(suffix "")
  elseif(suffix STREQUAL "")
    set(suffix -real)
  endif()
  set(${out} "${number}${suffix}" PARENT_SCOPE)
endfunction()

# Stops if nvcc, or the kernels, cannot do a number that was written in <text>.
function(_mamba_check_number number word text supported)
  if(NOT number IN_LIST supported OR number LESS MAMBA_OLDEST_ARCHITECTURE)
    string(REPLACE ";" ", " can "${supported}")
    message(FATAL_ERROR "CUDA architecture \"${word}\" of \"${text}\" cannot be built: the kernels need "
                        "${MAMBA_OLDEST_ARCHITECTURE} or newer, and this nvcc builds ${can}. Leave it out, or take "
                        "a CUDA that builds it.")
  endif()
endfunction()

# mamba_check_architectures(<CMAKE_CUDA_ARCHITECTURES> <supported>)
# What CMake is given as it stands; its names, such as all-major, are CMake's own matter.
function(mamba_check_architectures text supported)
  foreach(word IN LISTS text)
    if(word MATCHES "^([0-9]+)[af]?(-real|-virtual)?$")
      _mamba_check_number(${CMAKE_MATCH_1} ${word} "${text}" "${supported}")
    endif()
  endforeach()
endfunction()

# mamba_cuda_architectures(<out> <text> <supported> <native>)
#   text       7.5;8.6+PTX | 75,86 | sm_90 | Ampere | native | all | all-major | wheel | any mixture
#   supported  the numbers that nvcc builds: 75;80;...
#   native     the numbers of this machine's GPUs; empty for none
# Names are cut to what nvcc builds. A number that it does not build is an error.
function(mamba_cuda_architectures out text supported native)
  string(REPLACE ";" ", " can "${supported}")
  set(known ${supported})
  list(FILTER known EXCLUDE REGEX "^([0-9]|[0-6][0-9]|7[0-4])$") # below the oldest
  set(_mamba_name_all ${known})
  set(_mamba_name_all-major ${known})
  list(FILTER _mamba_name_all-major INCLUDE REGEX "0$|^${MAMBA_OLDEST_ARCHITECTURE}$")
  set(_mamba_name_native "")
  foreach(number IN LISTS native)
    if(number IN_LIST known)
      list(APPEND _mamba_name_native ${number})
    endif()
  endforeach()

  set(result "")
  string(TOLOWER "${text}" words)
  string(REGEX REPLACE "[\"' \t,;]+" ";" words "${words}")
  list(REMOVE_ITEM words "")
  foreach(word IN LISTS words)
    _mamba_parse_number(architecture "${word}")
    if(architecture)
      string(REGEX MATCH "^[0-9]+" number "${architecture}")
      _mamba_check_number(${number} "${word}" "${text}" "${supported}")
      list(APPEND result ${architecture})
      continue()
    endif()

    set(name "${word}")
    if(NOT DEFINED _mamba_name_${name})
      string(REGEX REPLACE "\\+ptx$" "" name "${name}")
    endif()
    if(name STREQUAL "auto")
      set(name native)
    endif()
    if(name STREQUAL "native" AND NOT _mamba_name_native)
      message(STATUS "CUDA: no GPU here for \"${word}\", taking the wheel's architectures")
      set(name wheel)
    elseif(NOT DEFINED _mamba_name_${name})
      message(FATAL_ERROR "CUDA architecture \"${word}\" of \"${text}\" is unknown: write numbers as 8.6, 86 or "
                          "8.6+PTX (this nvcc builds ${can}), or native, all, all-major, wheel, Turing, "
                          "Ampere, Ada, Hopper, Blackwell")
    endif()
    set(built "")
    foreach(number IN LISTS _mamba_name_${name})
      if(number IN_LIST known)
        list(APPEND built ${number})
      endif()
    endforeach()
    if(NOT built)
      message(STATUS "CUDA: this nvcc builds nothing of \"${word}\" (it builds ${can})")
      continue()
    endif()
    list(TRANSFORM built APPEND -real)
    if(word MATCHES "\\+ptx$" OR NOT name MATCHES "^native$|tegra$")
      string(REGEX REPLACE "-real$" "" built "${built}") # PTX of the newest
    endif()
    list(APPEND result ${built})
  endforeach()

  list(REMOVE_DUPLICATES result)
  foreach(both IN LISTS result) # 86 is 86-real and 86-virtual
    if(NOT both MATCHES "-")
      list(REMOVE_ITEM result ${both}-real ${both}-virtual)
    endif()
  endforeach()
  list(SORT result COMPARE NATURAL)
  if(NOT result)
    message(FATAL_ERROR "CUDA architectures \"${text}\" leave nothing to build: this nvcc builds ${can}")
  endif()
  set(${out} "${result}" PARENT_SCOPE)
endfunction()
