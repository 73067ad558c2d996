# cmake -DNAMES=A,B -DRECORD=<file> -P: writes the environment variables, leaving an equal record untouched.
string(REPLACE "," ";" NAMES "${NAMES}")
set(text "")
foreach(name IN LISTS NAMES)
  string(APPEND text "${name}=$ENV{${name}}\n")
endforeach()
file(CONFIGURE OUTPUT "${RECORD}" CONTENT "${text}" @ONLY)
