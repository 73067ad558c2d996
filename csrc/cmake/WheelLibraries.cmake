# Which other op libraries may go into the wheel. Needs no project: the tests run it in cmake -P.

# mamba_wheel_libraries(<out> <own> <path>...)
#   own    file name of the library that this build makes
#   path   op libraries of other builds, relative to the sources or absolute
# The loader picks by name: a file that it would not find, or that another would replace, is an error.
function(mamba_wheel_libraries out own)
  cmake_path(GET own EXTENSION LAST_ONLY suffix)
  set(names mamba_native_cpu${suffix} mamba_native_cu12${suffix} mamba_native_cu13${suffix})
  list(REMOVE_ITEM names ${own})
  string(REPLACE ";" ", " expected "${names}")
  set(result "")
  foreach(path IN LISTS ARGN)
    cmake_path(SET file NORMALIZE "${path}") # with slashes, also where Windows wrote it
    cmake_path(ABSOLUTE_PATH file BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}")
    cmake_path(GET file FILENAME name)
    if(name STREQUAL own)
      message(FATAL_ERROR "MAMBA_WHEEL_EXTRA_LIBS: ${file} has the name of the library that this build makes; give "
                          "those of other builds (${expected}), or configure this one for another CUDA major")
    elseif(NOT name IN_LIST names)
      message(FATAL_ERROR "MAMBA_WHEEL_EXTRA_LIBS: ${file} does not fit into this wheel; expected at most one "
                          "each of ${expected}")
    elseif(NOT EXISTS "${file}" OR IS_DIRECTORY "${file}")
      message(FATAL_ERROR "MAMBA_WHEEL_EXTRA_LIBS: ${file} does not exist; build it first, as in "
                          "cmake --build --preset linux-wheel-cu12 (x64-wheel-cu12 on Windows)")
    endif()
    list(REMOVE_ITEM names ${name}) # of two with one name only one would arrive
    list(APPEND result "${file}")
  endforeach()
  set(${out} "${result}" PARENT_SCOPE)
endfunction()
