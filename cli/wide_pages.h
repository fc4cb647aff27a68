// What a worker on a Hopper card keeps of its memory where KV is fp8: room for pages that are made
// bfloat16 in front of prompts' attention (docs/gpu_kernels.md).
#pragma once

#include <cstdint>

#include "common/base/kv_layout.h"
#include "common/base/model_config.h"

namespace tandem::cli {

// As engine/kernels/cuda/cuda_ops.cc takes it.
inline int64_t WidePageBytes(const ModelConfig& model, DType kv_dtype) {
  const bool widens =
      kv_dtype == DType::kFloat8E4M3 && (model.head_dim == 64 || model.head_dim == 128);
  return widens ? int64_t{256} << 20 : 0;
}

}  // namespace tandem::cli
