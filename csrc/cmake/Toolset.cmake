# What goes wrong on a machine before the first file compiles, told in a sentence with its cure.
# The functions read CMake's own variables; the tests set those in cmake -P.

# Before project(): afterwards CMake has stopped already, and said less.
function(mamba_check_prompt)
  string(TOLOWER "${CMAKE_CXX_COMPILER}" compiler)
  if(NOT CMAKE_HOST_WIN32 OR CMAKE_GENERATOR MATCHES "Visual Studio" OR NOT compiler MATCHES "(^|[/\\])cl(\\.exe)?$")
    return()
  endif()
  string(CONCAT cure "open \"x64 Native Tools Command Prompt for VS\" from the Start menu, or the folder in Visual "
         "Studio; from any other prompt, python scripts/test.py and scripts/demo.py find the compiler by themselves.")
  set(target "$ENV{VSCMD_ARG_TGT_ARCH}")
  if(target AND NOT target STREQUAL "x64")
    message(FATAL_ERROR "This prompt compiles for ${target}, and torch for Windows is x64. Close it and ${cure}")
  endif()
  find_program(_mamba_cl NAMES "${CMAKE_CXX_COMPILER}" NO_CACHE)
  if(NOT _mamba_cl)
    message(FATAL_ERROR "The compiler ${CMAKE_CXX_COMPILER} is not on PATH: no Visual Studio is loaded in this "
                        "prompt. If it is installed, with the workload \"Desktop development with C++\", ${cure}")
  endif()
  foreach(variable IN ITEMS INCLUDE LIB)
    if("$ENV{${variable}}" STREQUAL "")
      message(FATAL_ERROR "${_mamba_cl} is there, but ${variable} is empty, so it finds no headers or libraries: "
                          "vcvars64.bat has not run in this prompt. Instead, ${cure}")
    endif()
  endforeach()
endfunction()

# After project(): what the compiler really compiles for, however it was found.
function(mamba_check_target)
  if(CMAKE_SIZEOF_VOID_P EQUAL 4)
    set(found "32 bits")
  elseif(MSVC AND NOT "${MSVC_CXX_ARCHITECTURE_ID}" MATCHES "^(x64)?$")
    set(found "${MSVC_CXX_ARCHITECTURE_ID}")
  else()
    return()
  endif()
  message(FATAL_ERROR "${CMAKE_CXX_COMPILER} compiles for ${found}, and torch has 64 bits, on Windows x64. On "
                      "Windows open \"x64 Native Tools Command Prompt for VS\", or give a solution -A x64; "
                      "elsewhere leave out -m32. Then configure into an empty build folder.")
endfunction()

# mamba_check_python(<path of a Python>)
function(mamba_check_python python)
  string(TOLOWER "${python}" path)
  if(path MATCHES "[/\\]windowsapps[/\\]")
    message(FATAL_ERROR "${python} is the Microsoft Store's Python, or only its alias that opens the Store; a build "
                        "cannot use either. Install Python from python.org (winget install Python.Python.3.13), "
                        "install torch there, and give -DPython_EXECUTABLE=<its python.exe>. The alias is switched "
                        "off in Settings > Apps > Advanced app settings > App execution aliases.")
  endif()
endfunction()

# Looks for Python as find_package does, and tells the one cause that it cannot name.
function(mamba_find_python)
  if(Python_EXECUTABLE)
    mamba_check_python("${Python_EXECUTABLE}")
  endif()
  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_Interpreter_FOUND)
    mamba_check_python("${Python_EXECUTABLE}")
  else() # the alias is a program that does not run
    find_program(_mamba_python NAMES python3 python NO_CACHE)
    mamba_check_python("${_mamba_python}")
  endif()
endfunction()
