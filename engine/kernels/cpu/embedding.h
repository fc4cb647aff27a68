// out[i] = table[ids[i]]: rows of a [vocab][width] table as stored in the checkpoint, to float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device/cpu/threads.h"
#include "engine/kernels/element.h"

namespace tandem::engine {

// out: [count][width]. Every id must be in range.
void GatherEmbedding(const void* table, Element element, size_t width, const int32_t* ids,
                     size_t count, float* out, Threads* threads);

}  // namespace tandem::engine
