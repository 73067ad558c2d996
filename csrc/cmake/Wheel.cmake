# Target wheel: packs what is built into MAMBA_DIST_DIR. pyproject.toml describes the same wheel to pip, which
# installs component wheel_native and adds the Python files itself.

include(WheelLibraries)
get_target_property(_own mamba_native_ops OUTPUT_NAME)
mamba_wheel_libraries(_libraries ${_own}${CMAKE_SHARED_MODULE_SUFFIX} ${MAMBA_WHEEL_EXTRA_LIBS})

install(TARGETS mamba_native_ops COMPONENT wheel_native EXCLUDE_FROM_ALL
        LIBRARY DESTINATION mamba_ssm/native RUNTIME DESTINATION mamba_ssm/native)
install(FILES ${_libraries} DESTINATION mamba_ssm/native COMPONENT wheel_native EXCLUDE_FROM_ALL)
# modules beside the package: those listed and no others
install(FILES python/selective_scan_cuda.py DESTINATION . COMPONENT wheel_native EXCLUDE_FROM_ALL)
install(DIRECTORY python/mamba_ssm DESTINATION . COMPONENT wheel_python EXCLUDE_FROM_ALL
        MESSAGE_NEVER PATTERN __pycache__ EXCLUDE)

find_package(Python COMPONENTS Interpreter REQUIRED)
set(_stage ${PROJECT_BINARY_DIR}/wheel)
set(_install ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${_stage} --config $<CONFIG> --strip)
add_custom_target(wheel
  COMMAND ${CMAKE_COMMAND} -E rm -rf ${_stage}
  COMMAND ${_install} --component wheel_native
  COMMAND ${_install} --component wheel_python
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/mamba_wheel.py ${_stage} ${MAMBA_DIST_DIR}
  WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} USES_TERMINAL VERBATIM)
add_dependencies(wheel mamba_native_ops)
