// What --dtype, --kv-cache-dtype and --quantization take, in every program.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/base/dtype.h"

namespace tandem {

inline const std::vector<std::string> kDTypeChoices = {"auto", "bfloat16", "float32"};
inline const std::vector<std::string> kKvCacheDTypeChoices = {"auto", "fp8"};
inline const std::vector<std::string> kQuantizationChoices = {"auto", "fp8"};

// The type of KV under a choice of --kv-cache-dtype: that of the weights, or fp8.
constexpr DType KvCacheDType(std::string_view choice, DType weights) {
  return choice == "fp8" ? DType::kFloat8E4M3 : weights;
}

}  // namespace tandem
