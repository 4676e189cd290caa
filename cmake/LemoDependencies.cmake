# Finds what lemo builds against; every failure says what to do.
#
# Defines OpenMP::OpenMP_CXX, lemo_blas, LEMO_HAVE_CUDA and, as needed, lemo_torch, pybind11,
# GTest::gtest_main, benchmark::benchmark_main, lemo_copy_shared_library.

find_package(OpenMP REQUIRED COMPONENTS CXX)
if(LEMO_PYTHON)
  set(lemo_python_parts Interpreter Development.Module)
else()
  set(lemo_python_parts Interpreter)
endif()
find_package(Python3 REQUIRED COMPONENTS ${lemo_python_parts})

# A folder inside an installed Python package, by a Python expression; empty where it is absent.
function(lemo_python_path result expression)
  execute_process(COMMAND ${Python3_EXECUTABLE} -c "print(${expression})"
    OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
  if(status EQUAL 0)
    set(${result} "${path}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# Headers of another interpreter, and how the names of its modules end.
function(lemo_python_of interpreter include suffix)
  execute_process(COMMAND ${interpreter} -c
    "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'), sep=';')"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "LEMO_PYTHONS: expected interpreters of Python, got '${interpreter}': ${status}")
  endif()
  list(GET found 0 folder)
  list(GET found 1 end)
  if(NOT EXISTS "${folder}/Python.h")
    message(FATAL_ERROR "LEMO_PYTHONS: '${interpreter}' has no headers: there is no ${folder}/Python.h")
  endif()
  set(${include} "${folder}" PARENT_SCOPE)
  set(${suffix} "${end}" PARENT_SCOPE)
endfunction()

# --- BLAS: OpenBLAS as a wheel, with one C interface on every machine ----------------------------
lemo_python_path(blas_lib "__import__('scipy_openblas32').get_lib_dir()")
lemo_python_path(blas_include "__import__('scipy_openblas32').get_include_dir()")
if(NOT blas_lib)
  message(FATAL_ERROR "OpenBLAS not found: run '${Python3_EXECUTABLE} -m pip install scipy-openblas32'")
endif()
add_library(lemo_blas SHARED IMPORTED)
set_target_properties(lemo_blas PROPERTIES
  IMPORTED_LOCATION "${blas_lib}/libscipy_openblas.so"
  IMPORTED_SONAME libscipy_openblas.so
  INTERFACE_INCLUDE_DIRECTORIES "${blas_include}")

# --- CUDA ----------------------------------------------------------------------------------------
set(LEMO_HAVE_CUDA OFF)
if(NOT LEMO_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    # CMake 3.25 does not know that this nvcc takes C++20.
    if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(LEMO_HAVE_CUDA ON)
    if(NOT LEMO_CUTLASS_INCLUDE)
      lemo_python_path(cutlass
        "__import__('importlib.util').util.find_spec('cutlass_library').submodule_search_locations[0]")
      if(cutlass)
        set(LEMO_CUTLASS_INCLUDE "${cutlass}/source/include")
      endif()
    endif()
    if(NOT EXISTS "${LEMO_CUTLASS_INCLUDE}/cutlass/cutlass.h")
      message(FATAL_ERROR "nvcc is here but the CUTLASS headers are not: run "
        "'${Python3_EXECUTABLE} -m pip install --no-deps nvidia-cutlass==4.2.0.0', or give "
        "-DLEMO_CUTLASS_INCLUDE=<cutlass>/include, or build without CUDA: -DLEMO_CUDA=OFF")
    endif()
  elseif(LEMO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LEMO_CUDA=ON but no nvcc was found; put it on PATH or use -DLEMO_CUDA=OFF")
  endif()
endif()
message(STATUS "lemo: CUDA kernels ${LEMO_HAVE_CUDA}")

# Replaces "auto" and "release" in the variable `name`, of this scope, by architectures.
function(lemo_resolve_architectures name)
  set(release "80-real;86-real;89-real;90")
  set(found "")
  if("${${name}}" STREQUAL "auto")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE status)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
      list(REMOVE_DUPLICATES capabilities)
      foreach(capability IN LISTS capabilities)
        if(capability VERSION_GREATER_EQUAL 8.0)
          string(REPLACE "." "" digits "${capability}")
          list(APPEND found "${digits}-real")
        endif()
      endforeach()
    endif()
    if(found)
      message(STATUS "lemo: kernels for the GPUs of this machine: ${found}")
    else()
      message(STATUS "lemo: no GPU of compute capability 8.0 or higher is visible, kernels for all "
        "of a release: ${release}")
    endif()
  endif()
  if(found)
    set(${name} "${found}" PARENT_SCOPE)
  elseif("${${name}}" MATCHES "^(auto|release)$")
    set(${name} "${release}" PARENT_SCOPE)
  endif()
endfunction()

# --- torch: headers and libtorch_cpu of the installed package, never imported --------------------
if(LEMO_PYTHON)
  if(NOT LEMO_TORCH_DIR)
    lemo_python_path(LEMO_TORCH_DIR
      "__import__('importlib.util').util.find_spec('torch').submodule_search_locations[0]")
  endif()
  if(NOT EXISTS "${LEMO_TORCH_DIR}/include/torch/csrc/stable/library.h")
    message(FATAL_ERROR "lemo needs an installed torch >= 2.11 (headers of the stable ABI); found "
      "'${LEMO_TORCH_DIR}'. Install torch first, then lemo; or give -DLEMO_TORCH_DIR=<torch package>")
  endif()
  add_library(lemo_torch SHARED IMPORTED)
  set_target_properties(lemo_torch PROPERTIES
    IMPORTED_LOCATION "${LEMO_TORCH_DIR}/lib/libtorch_cpu.so"
    INTERFACE_INCLUDE_DIRECTORIES "${LEMO_TORCH_DIR}/include"
    # One library for every torch from 2.11 on.
    INTERFACE_COMPILE_DEFINITIONS "TORCH_TARGET_VERSION=0x020b000000000000"
    # libtorch_cpu drags in libraries that only torch's own loader finds.
    INTERFACE_LINK_OPTIONS "-Wl,--allow-shlib-undefined")
  lemo_python_path(pybind11_DIR "__import__('pybind11').get_cmake_dir()")
  set(PYBIND11_FINDPYTHON ON)
  set(Python_EXECUTABLE ${Python3_EXECUTABLE})
  find_package(pybind11 CONFIG REQUIRED)
endif()

# --- GoogleTest and Google Benchmark -------------------------------------------------------------
if(LEMO_TESTS OR LEMO_GPU_TESTS)
  find_package(GTest)
  find_package(benchmark)
  if(NOT GTest_FOUND OR NOT benchmark_FOUND)
    message(FATAL_ERROR "GoogleTest or Google Benchmark not found; on Debian and Ubuntu: "
      "apt-get install libgtest-dev libbenchmark-dev")
  endif()
endif()
if(LEMO_GPU_TESTS AND NOT LEMO_HAVE_CUDA)
  message(FATAL_ERROR "LEMO_GPU_TESTS=ON needs the CUDA kernels: put nvcc on PATH")
endif()

# After `target` is built, copies the shared library of an imported target to `folder`, under the
# name that the loader looks for.
function(lemo_copy_shared_library target library folder)
  get_target_property(type ${library} TYPE)
  if(NOT type STREQUAL "SHARED_LIBRARY")
    return()
  endif()
  add_custom_command(TARGET ${target} POST_BUILD COMMAND ${CMAKE_COMMAND} -E copy_if_different
    "$<TARGET_FILE:${library}>" "${folder}/$<TARGET_SONAME_FILE_NAME:${library}>")
endfunction()
