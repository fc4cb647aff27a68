// -h and --help of the benchmarks, which would otherwise begin to measure.
#pragma once

#include <cstdio>
#include <string_view>

namespace tandem {

// Prints `usage` and returns true where the arguments ask for help.
inline bool AnswerHelp(int argc, const char* const* argv, const char* usage) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument != "-h" && argument != "--help") continue;
    std::printf("usage: %s\n", usage);
    return true;
  }
  return false;
}

}  // namespace tandem
