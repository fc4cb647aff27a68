// Random weights for --load-format=dummy: speed tests without a checkpoint.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "engine/device/cpu/threads.h"

namespace tandem::engine {

// What begins a tensor's stream of values (engine/kernels/dummy_value.h).
uint64_t DummyKey(std::string_view name, uint64_t seed);

// Fills `out` (bfloat16 bits) with values that depend only on (seed, name, index): 1 for norms,
// otherwise uniform with mean 0 and standard deviation 0.02.
void FillDummyTensor(std::string_view name, uint64_t seed, std::span<uint16_t> out,
                     Threads* threads);

}  // namespace tandem::engine
