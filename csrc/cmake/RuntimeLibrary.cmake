# mamba_check_runtime_library(<target>...)
# Torch is built /MD. What an operation returns is allocated here and freed there, `optional` arguments the
# other way around: both must use the one heap of ucrtbase.dll. Every other runtime library, the debug one
# too, has a heap of its own, and freeing on the wrong one corrupts it or ends the process.
function(mamba_check_runtime_library)
  set(found "")
  foreach(target IN LISTS ARGN)
    get_target_property(library ${target} MSVC_RUNTIME_LIBRARY)
    if(NOT library STREQUAL "MultiThreadedDLL")
      list(APPEND found "MSVC_RUNTIME_LIBRARY of ${target} is ${library}")
    endif()
  endforeach()
  set(given "$CACHE{CMAKE_MSVC_RUNTIME_LIBRARY}") # Options.cmake hides it
  if(given AND NOT given STREQUAL "MultiThreadedDLL")
    list(APPEND found "CMAKE_MSVC_RUNTIME_LIBRARY was given as ${given}")
  endif()
  set(configurations ${CMAKE_CONFIGURATION_TYPES} ${CMAKE_BUILD_TYPE})
  list(TRANSFORM configurations TOUPPER)
  list(TRANSFORM configurations PREPEND CMAKE_CXX_FLAGS_)
  foreach(flags IN ITEMS CMAKE_CXX_FLAGS ${configurations})
    if("${${flags}}" MATCHES "(^| )[/-](MT|MTd|MDd)( |$)")
      list(APPEND found "${flags} has /${CMAKE_MATCH_2}")
    endif()
  endforeach()
  if(found)
    list(JOIN found ", " found)
    message(FATAL_ERROR "The op library must use the runtime library MultiThreadedDLL (/MD), in debug builds too, "
                        "but ${found}. Torch is built /MD and frees what the operations allocate; another runtime "
                        "library, also the debug one, has another heap. Remove that setting.")
  endif()
endfunction()
