// The ops of engine/kernels/ops.h on NVIDIA GPUs of compute capability 8.0 and newer, in bfloat16:
// which kernel computes what. The kernels have headers of their own.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

#include "engine/device/cuda/cuda_device.h"
#include "engine/kernels/ops.h"

namespace tandem::engine::cuda {

// Which families of kernels may be used: tests and benchmarks leave some out. What is left must
// compute every shape, and the generic kernels always do.
struct CudaOpsOptions {
  bool skinny = true;             // skinny_linear.h
  bool hopper = true;             // hopper_linear.h, and prefill attention on sm_90a
  bool decode_attention = true;   // decode_attention.h
  bool prefill_attention = true;  // prefill_attention.h
  bool library = true;            // cublas_linear.h; where nothing else would do: plain_linear.h
  bool overlap = true;            // programmatic dependent launches
  // Rows up to which products are the skinny kernels'; 0: what is best for the device.
  int skinny_rows = 0;
};

// With all scratch memory that the ops will use. UNIMPLEMENTED for another element than kBFloat16,
// RESOURCE_EXHAUSTED where there is no room, NOT_FOUND where a library that these shapes need is
// missing.
absl::StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const OpsShape& shape, CudaDevice* device,
                                                 const CudaOpsOptions& options = {});

}  // namespace tandem::engine::cuda
