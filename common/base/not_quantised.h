// What is said of a flag that changes weights where a checkpoint brings quantised ones.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"

#include "common/base/model_config.h"
#include "common/base/status.h"

namespace tandem {

// INVALID_ARGUMENT, naming `flag` and what the weights in `model_dir` are, unless they are not
// quantised.
inline absl::Status CheckNotQuantised(std::string_view flag, const ModelConfig& config,
                                      const std::string& model_dir) {
  if (!config.quantisation.has_value()) return absl::OkStatus();
  return InvalidArgument(
      "{} is for weights that are not quantised, those of {} are ({}); leave the flag out", flag,
      model_dir, config.quantisation->Describe());
}

}  // namespace tandem
