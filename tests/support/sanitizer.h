// What a sanitizer costs the programs of a test, as tests/CMakeLists.txt says it in the
// environment.
#pragma once

#include <cstdint>

namespace tandem {

// How much of what was freed a process keeps because it is watched; 0 without a sanitizer.
int64_t SanitizerKeepsMib();
// How many times longer all may take, on a machine that other tests use too; 1 without one.
double SanitizerSlowsBy();

}  // namespace tandem
