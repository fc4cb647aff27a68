# What a build for GPUs needs: nvcc, the toolkit, FlashInfer's headers, and the functions tandem_cuda_library and
# tandem_cuda_program. TANDEM_CUDA is AUTO unless set: then CUDA is built where an nvcc is found that is new enough.

# As scripts/setup cuda asks for it too.
set(TANDEM_MINIMAL_NVCC 12.8)
set(TANDEM_CUDA AUTO CACHE STRING "Build for GPUs: ON, OFF, or AUTO (where nvcc ${TANDEM_MINIMAL_NVCC} or newer is found)")
set_property(CACHE TANDEM_CUDA PROPERTY STRINGS AUTO ON OFF)
# Machine code for A100, RTX 40 and L40, H100 and H200, and code that drivers of newer cards compile. Only Hopper (90a) has
# instructions of its own here; what uses them is guarded by __CUDA_ARCH_FEAT_SM90_ALL or built for Hopper alone. A build for
# one's own card is much shorter, e.g. -DTANDEM_CUDA_ARCHITECTURES=90a-real.
set(tandem_every_card 80-real 89-real 90a-real 90-virtual)
set(TANDEM_CUDA_ARCHITECTURES ${tandem_every_card} CACHE STRING "CMAKE_CUDA_ARCHITECTURES of this build")

# The first of the places named that has an nvcc new enough goes to TANDEM_NVCC, else what is wrong to TANDEM_NO_NVCC.
function(tandem_find_nvcc)
  find_program(path_nvcc nvcc NO_CACHE)
  set(old "")
  foreach(candidate "${CMAKE_CUDA_COMPILER}" "$ENV{CUDACXX}" "${path_nvcc}" /usr/local/cuda/bin/nvcc
                    ${CMAKE_SOURCE_DIR}/build/cuda-toolkit/bin/nvcc)
    if(NOT candidate OR NOT EXISTS "${candidate}")
      continue()
    endif()
    execute_process(COMMAND ${candidate} --version OUTPUT_VARIABLE output ERROR_QUIET)
    if(NOT output MATCHES "release ([0-9]+\\.[0-9]+)")
      continue()
    endif()
    if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL TANDEM_MINIMAL_NVCC)
      set(TANDEM_NVCC "${candidate}" PARENT_SCOPE)
      return()
    endif()
    string(APPEND old "; ${candidate} is of CUDA ${CMAKE_MATCH_1}")
  endforeach()
  set(TANDEM_NO_NVCC "no nvcc ${TANDEM_MINIMAL_NVCC} or newer in CUDACXX, PATH, /usr/local/cuda, build/cuda-toolkit${old}"
      PARENT_SCOPE)
endfunction()

if(TANDEM_SANITIZE AND TANDEM_CUDA STREQUAL "AUTO")
  set(TANDEM_CUDA OFF)  # nvcc does not know clang's sanitizers
endif()
if(TANDEM_CUDA)  # AUTO is true
  tandem_find_nvcc()
  if(TANDEM_NVCC)
    set(TANDEM_CUDA ON)
  elseif(TANDEM_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA is left out: ${TANDEM_NO_NVCC}. `scripts/setup cuda` fetches one.")
    set(TANDEM_CUDA OFF)
  else()
    message(FATAL_ERROR "TANDEM_CUDA is ON, but there is ${TANDEM_NO_NVCC}. `scripts/setup cuda` fetches a CUDA 13.0 toolkit; "
                        "-DTANDEM_CUDA=OFF builds for CPUs only.")
  endif()
endif()
if(NOT TANDEM_CUDA)
  return()
endif()

execute_process(COMMAND ${CMAKE_SOURCE_DIR}/scripts/setup flashinfer RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "The CUDA engine needs FlashInfer's headers in build/flashinfer. `scripts/setup flashinfer` fetches them "
                      "from PyPI (8 MB) and has just failed; run it where there is a network, or copy that folder from another "
                      "checkout. -DTANDEM_CUDA=OFF builds for CPUs only.")
endif()
add_library(tandem_flashinfer INTERFACE)
target_include_directories(tandem_flashinfer SYSTEM INTERFACE ${CMAKE_SOURCE_DIR}/build/flashinfer/include)

if(TANDEM_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${TANDEM_CCACHE})
endif()
set(CMAKE_CUDA_COMPILER ${TANDEM_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${TANDEM_CUDA_ARCHITECTURES})
enable_language(CUDA)
# CMake 3.25 does not know by itself which standards nvcc 13 has.
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_STANDARD_DEFAULT 17)
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O1 -lineinfo -Xcompiler=-g1")
find_package(CUDAToolkit ${TANDEM_MINIMAL_NVCC} REQUIRED)
if(TANDEM_NVCC STREQUAL ${CMAKE_SOURCE_DIR}/build/cuda-toolkit/bin/nvcc)
  # Where programs and tests look for cuBLAS and NCCL first: ../lib.
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
  foreach(library libcublasLt.so.${CUDAToolkit_VERSION_MAJOR} libnccl.so.2)
    file(CREATE_LINK ${CMAKE_SOURCE_DIR}/build/cuda-toolkit/lib/${library} ${CMAKE_BINARY_DIR}/lib/${library} SYMBOLIC)
  endforeach()
endif()
# Only its header: programs find the library when they run (common/cuda/cuda_library.h).
find_path(TANDEM_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if(TANDEM_NCCL_INCLUDE_DIR)
  set(TANDEM_NCCL ON)
  add_library(tandem_nccl_headers INTERFACE)
  target_include_directories(tandem_nccl_headers SYSTEM INTERFACE ${TANDEM_NCCL_INCLUDE_DIR})
else()
  set(TANDEM_NCCL OFF)
  message(STATUS "NCCL is left out: there is no nccl.h. Debian's libnccl-dev has it, as has `scripts/setup cuda`'s toolkit.")
endif()
message(STATUS "CUDA ${CUDAToolkit_VERSION}: ${TANDEM_NVCC}, for ${TANDEM_CUDA_ARCHITECTURES}")

# Warnings of nvcc and of the host's compiler are errors, as in C++.
add_library(tandem_cuda_options INTERFACE)
target_compile_options(tandem_cuda_options INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror,-Wno-missing-field-initializers,-fno-omit-frame-pointer>")

# What all but Hopper's own files are built for by default. None of them uses what sm_90a adds to sm_90, and of what RTX 40 adds
# to A100 only the conversion of e4m3 (e4m3.cuh), which is made of other instructions there: two translations are enough for the
# three kinds of machine code and PTX.
set(tandem_every_card_options -gencode=arch=compute_80,code=[sm_80,sm_89] -gencode=arch=compute_90,code=[sm_90,compute_90])

function(tandem_build_for_every_card NAME)
  if(TANDEM_CUDA_ARCHITECTURES STREQUAL "${tandem_every_card}")
    set_target_properties(${NAME} PROPERTIES CUDA_ARCHITECTURES OFF)
    target_compile_options(${NAME} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${tandem_every_card_options}>")
  endif()
endfunction()

# tandem_cuda_library(NAME SOURCES a.cu b.cc ... [PUBLIC targets...] [PRIVATE targets...] [HOPPER]): as tandem_library, for
# folders of CUDA. HOPPER builds for sm_90a alone: for files that would be empty elsewhere.
function(tandem_cuda_library NAME)
  cmake_parse_arguments(ARG "HOPPER" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  tandem_library(${NAME} SOURCES ${ARG_SOURCES} PUBLIC CUDA::cudart_static ${ARG_PUBLIC}
                 PRIVATE tandem_cuda_options ${ARG_PRIVATE})
  if(ARG_HOPPER AND "90a-real" IN_LIST TANDEM_CUDA_ARCHITECTURES)
    set_target_properties(${NAME} PROPERTIES CUDA_ARCHITECTURES 90a-real)
  else()
    tandem_build_for_every_card(${NAME})
  endif()
endfunction()

# tandem_cuda_program(NAME SOURCES a.cu ... LINK ...): an executable of CUDA sources that is no test.
function(tandem_cuda_program NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE tandem_options tandem_cuda_options ${ARG_LINK})
endfunction()
