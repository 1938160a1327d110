# find_package(fastops): the target fastops::fastops.
get_filename_component(_fastops_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET fastops::fastops)
  add_library(fastops::fastops STATIC IMPORTED)
  set_target_properties(fastops::fastops PROPERTIES IMPORTED_LOCATION "${_fastops_prefix}/lib/libfastops.a"
                                                    INTERFACE_INCLUDE_DIRECTORIES "${_fastops_prefix}/include")
  target_compile_features(fastops::fastops INTERFACE cxx_std_20)
endif()
unset(_fastops_prefix)
