cmake_minimum_required(VERSION 3.25)
# Writes FILE with the commit of SOURCE, if that is not what it says already. Run by each build (common/base/CMakeLists.txt).
find_program(git git)
set(commit unknown)
if(git)
  execute_process(COMMAND ${git} -C ${SOURCE} describe --always --dirty --abbrev=12 --exclude=* OUTPUT_VARIABLE out
                  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(commit ${out})
  endif()
endif()
file(CONFIGURE OUTPUT ${FILE} CONTENT "#define TANDEM_COMMIT \"@commit@\"\n" @ONLY)
