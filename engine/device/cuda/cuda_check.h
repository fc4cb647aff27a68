// common/cuda/cuda_check.h under the names of this namespace.
#pragma once

#include "common/cuda/cuda_check.h"

namespace tandem::engine::cuda {

using ::tandem::cuda::CheckCuda;
using ::tandem::cuda::current_step;
using ::tandem::cuda::DieOfCudaError;
using ::tandem::cuda::kCudaErrorExit;

}  // namespace tandem::engine::cuda
