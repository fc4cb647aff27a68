// Element types of weights, activations and KV.
#pragma once

#include <cstddef>
#include <string_view>

namespace tandem {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr size_t DTypeSize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The name that flags and configs use.
constexpr std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

}  // namespace tandem
