// How Hopper's kernels describe matrices to the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace tandem::engine::cuda {

// Describes a dense row-major bfloat16 matrix in boxes of box_rows x 64 columns (128 bytes, the
// width of the swizzle that the products read). What lies outside reads as zeros and is not
// written. Encoding is arithmetic in the host's memory; it calls no driver.
cudaError_t EncodeMatrix(const __nv_bfloat16* data, int rows, int columns, int box_rows,
                         CUtensorMap* map);

}  // namespace tandem::engine::cuda
