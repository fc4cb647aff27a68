// What a sanitizer costs the programs of a test, as tests/CMakeLists.txt says it in the
// environment.
#pragma once

#include <cstdint>

namespace tandem {

// How much of what was freed a process keeps because it is watched; 0 without a sanitizer.
int64_t SanitizerKeepsMib();
// How many times longer all may take, on a machine that other tests use too; 1 without one.
double SanitizerSlowsBy();
// How many of `repetitions` a test runs: all, or under a sanitizer as many as take about as long.
// The first ones reach most of the code, and only an optimised build is quick enough for the rest.
int SanitizerShare(int repetitions);

}  // namespace tandem
