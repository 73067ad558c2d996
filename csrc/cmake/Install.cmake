# cmake --install: the C++ library with its headers and find_package(mamba_native).

include(CMakePackageConfigHelpers)
set(_package lib/cmake/mamba_native)

install(TARGETS mamba_native EXPORT mamba_native ARCHIVE DESTINATION lib COMPONENT cpp)
install(EXPORT mamba_native NAMESPACE mamba_native:: FILE mamba_native-targets.cmake
        DESTINATION ${_package} COMPONENT cpp)
foreach(_header IN ITEMS
        core/compiler.h core/dtype.h core/error.h core/parallel_for.h core/tensor.h
        causal_conv1d/causal_conv1d.h gated_norm/gated_norm.h layer_norm/layer_norm.h
        selective_scan/selective_scan.h state_update/state_update.h)
  cmake_path(GET _header PARENT_PATH _folder)
  install(FILES csrc/${_header} DESTINATION include/mamba_native/${_folder} COMPONENT cpp)
endforeach()

configure_package_config_file(csrc/cmake/mamba_native-config.cmake.in mamba_native-config.cmake
                              INSTALL_DESTINATION ${_package})
write_basic_package_version_file(mamba_native-config-version.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mamba_native-config.cmake ${PROJECT_BINARY_DIR}/mamba_native-config-version.cmake
        DESTINATION ${_package} COMPONENT cpp)
