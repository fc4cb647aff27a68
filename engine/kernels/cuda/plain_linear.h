// Products of any shape, correct and not fast: where the library has no algorithm (rows of weights
// that are not aligned), and the noise that products are timed on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace tandem::engine::cuda {

enum class ProductOutput {
  kBFloat16,    // y = x W^T
  kFloat32,     // y = x W^T
  kAddFloat32,  // y += x W^T
};

struct ProductShape {
  int n = 0;  // rows of the weights: columns of y
  int k = 0;
  ProductOutput output = ProductOutput::kBFloat16;

  bool operator==(const ProductShape&) const = default;
};

// Order of summation: ascending k, whatever else is in the batch.
cudaError_t PlainLinear(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                        const __nv_bfloat16* weight, void* y, cudaStream_t stream);

// Uniform in [-1, 1), a function of (seed, index).
cudaError_t FillNoise(__nv_bfloat16* data, size_t count, uint64_t seed, cudaStream_t stream);

}  // namespace tandem::engine::cuda
