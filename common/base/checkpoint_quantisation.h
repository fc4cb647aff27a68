// How the linear layers of a Hugging Face checkpoint are quantised, as quantization_config of
// config.json says it, or a file of its own beside that.
//
// GPTQ and AWQ (gemm), both with 4 bits: weight = scale * (value - zero point), with a scale and a
// zero point for each output and each group of inputs. Which layers are quantised is the tensors'
// to say: those with a .qweight. engine/model/quantised_linear.h reads them.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace tandem {

struct CheckpointQuantisation {
  enum class Method { kGptq, kAwq };
  static constexpr int kBits = 4;

  Method method = Method::kGptq;
  int group_size = 128;    // inputs with a scale in common: 32, 64 or 128; -1: all of them
  bool symmetric = false;  // every zero point is 8
  bool act_order = false;  // GPTQ: groups are not of neighbours; g_idx says which input is in which
  // GPTQ: zero points are stored less one ("v1", the format "gptq"), not as they are ("v2").
  bool zeros_less_one = false;

  std::string_view MethodName() const { return method == Method::kGptq ? "gptq" : "awq"; }
  // "GPTQ, 4 bits, groups of 128, symmetric, act-order", for people.
  std::string Describe() const;

  // `config` is the object of quantization_config, or the whole of a file; `fallback` its method
  // where it names none; `origin` begins every message. INVALID_ARGUMENT for any other kind, by its
  // name and with what to use instead.
  static absl::StatusOr<CheckpointQuantisation> Parse(const nlohmann::json& config,
                                                      std::string_view fallback,
                                                      const std::string& origin);
  // From the first of Files(); nullopt where there is none.
  static absl::StatusOr<std::optional<CheckpointQuantisation>> LoadFile(
      const std::string& model_dir);
  // Those of older tools that are there: quantize_config.json (AutoGPTQ), quant_config.json
  // (AutoAWQ).
  static std::vector<std::string> Files(const std::string& model_dir);
};

}  // namespace tandem
