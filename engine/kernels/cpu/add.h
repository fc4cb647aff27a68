// Residual connection.
#pragma once

#include <cstddef>

#include "engine/device/cpu/threads.h"

namespace tandem::engine {

// x[i] += y[i] for i < count.
void AddInPlace(float* x, const float* y, size_t count, Threads* threads);

}  // namespace tandem::engine
