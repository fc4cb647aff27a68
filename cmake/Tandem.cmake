# Build vocabulary of the project: compiler settings, third-party packages, and the functions
# tandem_library / tandem_binary / tandem_test / tandem_fuzz and their kin that every folder's CMakeLists.txt uses.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_program(TANDEM_CCACHE ccache)
if(TANDEM_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Else it would preprocess each file that it does not know before it is compiled: a tenth of a first build.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_DEPEND=1 ${TANDEM_CCACHE})
endif()
find_program(TANDEM_LLD ld.lld)
if(TANDEM_LLD)
  add_link_options(-fuse-ld=lld)
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(yaml-cpp REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(edit REQUIRED IMPORTED_TARGET libedit)
pkg_check_modules(httplib REQUIRED IMPORTED_TARGET cpp-httplib)
pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(hwy REQUIRED IMPORTED_TARGET libhwy)
# Highway code is compiled for the baseline of x86-64, AVX2 with FMA, and AVX-512. The variants in between would only cost
# compile time.
target_compile_definitions(PkgConfig::hwy INTERFACE "HWY_DISABLED_TARGETS=(HWY_SSSE3|HWY_SSE4|HWY_AVX3_DL)")

add_library(tandem_options INTERFACE)
target_include_directories(tandem_options INTERFACE ${CMAKE_SOURCE_DIR})
# For C++; nvcc's own are in Cuda.cmake.
function(tandem_add_options)
  target_compile_options(tandem_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${ARGN}>")
endfunction()
tandem_add_options(-Wall -Wextra -Werror -Wno-missing-field-initializers -fno-omit-frame-pointer)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlapping copies in std::string::insert and operator+ that are none (GCC bug 105651).
  tandem_add_options(-Wno-restrict)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  tandem_add_options(-Wthread-safety -Werror=thread-safety)
endif()

if(TANDEM_SANITIZE)
  # Every finding ends the process, so that a test fails by it.
  set(sanitize -fsanitize=${TANDEM_SANITIZE} -fno-sanitize-recover=all)
  add_compile_options(${sanitize})
  add_link_options(${sanitize})
endif()

# Code of tests need not be fast: optimising it takes a third of its compile time, and under a sanitizer a half.
set(TANDEM_TEST_OPTIMISATION -O1)
if(TANDEM_SANITIZE)
  set(TANDEM_TEST_OPTIMISATION -O0)
endif()
# Optimising what sanitizers add takes more than half of a file's compile time. Only the folders that compute
# or move bytes are worth it (tandem_library).
set(TANDEM_OPTIMISED_UNDER_SANITIZERS "^(common/(base|text)|engine|kvtransfer)(/|$)")
# What the fuzzers look into: with TANDEM_FUZZ these folders count which of their branches ran, and so may be told to.
set(TANDEM_FUZZED "^(common/(base|text)|engine/model|kvtransfer)(/|$)")

# The headers of gRPC, abseil and GoogleTest are most of what a compiler reads, and what they instantiate is most of what
# it writes. Sources compiled together cost clang a third; all presets do so but dev and clang, where few files change at a time.
# Names in anonymous namespaces of one target must differ then. And a file builds though it lacks an include that one
# before it has: scripts/check_includes finds that.
if(TANDEM_UNITY)
  set(CMAKE_UNITY_BUILD ON)
  set(CMAKE_UNITY_BUILD_BATCH_SIZE 16)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC takes what several sources together include, each of them, for headers.
    tandem_add_options(-Wno-subobject-linkage)
  endif()
endif()

# tandem_library(NAME SOURCES a.cc ... [PUBLIC targets...] [PRIVATE targets...])
# Headers are included from the repository root. What a header exposes goes to PUBLIC, the rest to PRIVATE.
function(tandem_library NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(${NAME} STATIC ${ARG_SOURCES})
  target_link_libraries(${NAME} PUBLIC ${ARG_PUBLIC} PRIVATE tandem_options ${ARG_PRIVATE})
  target_include_directories(${NAME} INTERFACE ${CMAKE_SOURCE_DIR})
  file(RELATIVE_PATH folder ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
  if(TANDEM_SANITIZE AND NOT folder MATCHES "${TANDEM_OPTIMISED_UNDER_SANITIZERS}")
    target_compile_options(${NAME} PRIVATE -O0)
  endif()
  if(TANDEM_FUZZ AND folder MATCHES "${TANDEM_FUZZED}")
    target_compile_options(${NAME} PRIVATE -fsanitize=fuzzer-no-link)
  endif()
endfunction()

# tandem_binary(NAME SOURCES ... LINK ...): an executable in <build>/bin.
function(tandem_binary NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE tandem_options ${ARG_LINK})
  if(TANDEM_SANITIZE)
    target_compile_options(${NAME} PRIVATE -O0)
  endif()
endfunction()

# tandem_test(NAME SOURCES ... LINK ... [TIMEOUT s] [LABELS l...]): a program and its ctest entry. For each label there is a
# target tests_<label> that builds the tests so labelled and nothing else. Label `tsan` says that the test and all that it runs
# work without gRPC and so can be believed under the thread sanitizer (docs/testing.md). Label `gpu` says that it needs a
# CUDA device: ctest counts it as skipped where it exits with 77, or where all of its tests skip themselves.
function(tandem_test NAME)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LINK;LABELS" ${ARGN})
  tandem_test_program(${NAME} SOURCES ${ARG_SOURCES} LINK ${ARG_LINK})
  if("gpu" IN_LIST ARG_LABELS)
    target_link_libraries(${NAME} PRIVATE tandem_cuda_options)
    tandem_build_for_every_card(${NAME})
    file(APPEND ${CMAKE_BINARY_DIR}/tests/gpu_tests.txt "${NAME}\n")  # for scripts/gpu_check
  endif()
  tandem_test_entry(${NAME} PROGRAM ${NAME} TIMEOUT ${ARG_TIMEOUT} LABELS ${ARG_LABELS})
endfunction()

# tandem_test_program(NAME SOURCES ... LINK ...): what entries run.
function(tandem_test_program NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE tandem_options tandem_test_support tandem_test_main
                        ${ARG_LINK})
  target_compile_options(${NAME} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${TANDEM_TEST_OPTIMISATION}>)
  set_target_properties(${NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
endfunction()

# tandem_test_entry(NAME PROGRAM p [FILE f] [TIMEOUT s] [LABELS l...]): ctest runs the program's tests, or those of one file.
function(tandem_test_entry NAME)
  cmake_parse_arguments(ARG "" "PROGRAM;FILE;TIMEOUT" "LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  set(environment "TANDEM_BIN_DIR=${CMAKE_BINARY_DIR}/bin" "TANDEM_SOURCE_DIR=${CMAKE_SOURCE_DIR}")
  if(TANDEM_SANITIZE)
    # Sanitized programs are several times slower.
    math(EXPR ARG_TIMEOUT "3 * ${ARG_TIMEOUT}")
    list(APPEND environment ${TANDEM_SANITIZER_ENVIRONMENT})
  endif()
  if(ARG_FILE)
    set(ARG_FILE --file=${ARG_FILE})
  endif()
  add_test(NAME ${NAME} COMMAND ${ARG_PROGRAM} ${ARG_FILE} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  # What may take long begins first, so that it does not end alone.
  set_tests_properties(${NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} COST ${ARG_TIMEOUT} LABELS "${ARG_LABELS}"
                       ENVIRONMENT "${environment}")
  if("gpu" IN_LIST ARG_LABELS)
    # The end of GoogleTest's output where all tests are skipped, and so none failed. One at a time has the card.
    set(all_skipped "PASSED  . 0 tests[.]\n.  SKIPPED . [0-9]+ tests?, listed below:(\n.  SKIPPED . [^\n]*)+\n*$")
    set_tests_properties(${NAME} PROPERTIES SKIP_RETURN_CODE 77 SKIP_REGULAR_EXPRESSION "${all_skipped}" RESOURCE_LOCK gpu)
  endif()
  foreach(label ${ARG_LABELS})
    if(NOT TARGET tests_${label})
      add_custom_target(tests_${label})
    endif()
    add_dependencies(tests_${label} ${ARG_PROGRAM})
  endforeach()
endfunction()

# tandem_fuzz(NAME SOURCES ... LINK ...): a libFuzzer program <build>/fuzz/NAME, also built by target `fuzzers`, and a ctest
# entry NAME_corpus that replays tests/fuzz/corpus/NAME. What it looks into stands in a folder of TANDEM_FUZZED.
function(tandem_fuzz NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE tandem_options ${ARG_LINK})
  target_compile_options(${NAME} PRIVATE -fsanitize=fuzzer-no-link)
  target_link_options(${NAME} PRIVATE -fsanitize=fuzzer)
  set_target_properties(${NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz)
  if(NOT TARGET fuzzers)
    add_custom_target(fuzzers)
  endif()
  add_dependencies(fuzzers ${NAME})
  add_test(NAME ${NAME}_corpus COMMAND ${NAME} -runs=0 ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${NAME})
  set_tests_properties(${NAME}_corpus PROPERTIES LABELS fuzz TIMEOUT 300
    ENVIRONMENT "TANDEM_SOURCE_DIR=${CMAKE_SOURCE_DIR}" PASS_REGULAR_EXPRESSION "Done [1-9]"
    FAIL_REGULAR_EXPRESSION "ERROR: ;SUMMARY: ")
endfunction()
