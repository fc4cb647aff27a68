// --quantization=fp8: which weights of a checkpoint are rounded to 8 bits, and how, where a device
// does not read them of 8 bits.
#pragma once

#include <string_view>

#include "engine/device/cpu/threads.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"

namespace tandem::engine {

// The matrices of layers. Embedding, norms, biases and head stay as they are.
bool IsFp8Weight(std::string_view tensor);

// `view`, [rows][inputs], with its rows rounded as engine/kernels/fp8_rows.h says. Its data is in
// `memory`, which grows: bfloat16, which holds what is left exactly.
TensorView RoundToFp8(const TensorView& view, Threads* threads, MemoryBlock* memory);

}  // namespace tandem::engine
