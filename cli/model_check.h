// Everything in a model directory that could keep a cluster from starting, looked at before
// anything does: `tandem up` and `tandem inspect` say the same of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"

namespace tandem::cli {

struct CheckedModel {
  ModelConfig config;
  int weight_files = 0;          // 0 where weights are made up
  int64_t checkpoint_bytes = 0;  // of these
  bool has_tokenizer = false;
  bool has_chat_template = false;
  // What works less than one may expect: no tokenizer, no chat template.
  std::vector<std::string> warnings;
};

// The first thing that is wrong: config.json, a weight file that is missing, cut off or no
// safetensors, generation_config.json, tokenizer, chat template. Reads headers, no weights.
// `dummy`: weights are made up, so that the directory needs none.
absl::StatusOr<CheckedModel> CheckModel(const std::string& model_dir, bool dummy);

}  // namespace tandem::cli
