// Products of weights with activations by cuBLASLt: for devices and shapes that have no kernel of
// their own, and for many rows before Hopper. The library is opened when it is first needed; no
// program links it.
//
// Which of the library's algorithms computes a product is settled when a shape is prepared, by
// timing the candidates of its heuristics on random data, once per (shape, bucket of rows). Rows
// are counted in powers of two: a product takes the algorithm of the bucket that holds it.
//
// Order of summation: the algorithm's. It is fixed within a process, and depends on the bucket;
// with `fixed` no algorithm cuts K, and all buckets have the one that the heuristics like best for
// the largest: no timing has a say, so that all processes on cards of one kind, with the same
// library and the same largest number of rows, choose alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "engine/kernels/cuda/plain_linear.h"

namespace tandem::engine::cuda {

class CublasLinear {
 public:
  // For the current device. `workspace`: kWorkspaceBytes of it, used by one stream at a time.
  // NOT_FOUND where there is no library, with the places that were searched.
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  static absl::StatusOr<std::unique_ptr<CublasLinear>> Create(void* workspace, bool fixed);
  virtual ~CublasLinear() = default;

  // Settles the algorithms of a shape for up to `max_rows` rows. `scratch`: memory of the device to
  // time in, with room for PrepareBytes; its contents are lost. Waits for the device.
  static size_t PrepareBytes(const ProductShape& shape, int max_rows);
  virtual absl::Status Prepare(const ProductShape& shape, int max_rows, void* scratch,
                               cudaStream_t stream) = 0;

  // x: [rows][k], weight: [n][k], y: [rows][n], of a prepared shape.
  virtual cudaError_t Run(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                          const __nv_bfloat16* weight, void* y, cudaStream_t stream) = 0;
};

}  // namespace tandem::engine::cuda
