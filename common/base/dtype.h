// Element types of weights, activations and KV.
#pragma once

#include <cstddef>
#include <string_view>

namespace tandem {

// Only KV has kFloat8E4M3.
enum class DType { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

constexpr size_t DTypeSize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat8E4M3:
      return 1;
  }
  return 0;
}

// The name that flags and configs use.
constexpr std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat8E4M3:
      return "fp8";
  }
  return "?";
}

}  // namespace tandem
