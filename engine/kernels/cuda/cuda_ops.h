// The ops of engine/kernels/ops.h on NVIDIA GPUs of compute capability 8.0 and newer, in bfloat16:
// which kernel computes what. The kernels have headers of their own.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

#include "engine/device/cuda/cuda_device.h"
#include "engine/kernels/ops.h"

namespace tandem::engine::cuda {

// For the device's calling thread, with all scratch memory that they will use. UNIMPLEMENTED for
// another element than kBFloat16, RESOURCE_EXHAUSTED where there is no room.
absl::StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const OpsShape& shape, CudaDevice* device);

}  // namespace tandem::engine::cuda
