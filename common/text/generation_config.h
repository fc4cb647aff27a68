// A model's generation_config.json: what sampling parameters a request gets that does not set them.
//
// Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem {

// Unset: the file does not say. Values are checked to be what sampling accepts.
struct GenerationDefaults {
  std::vector<int32_t> eos_token_ids;  // no duplicates
  std::optional<int32_t> bos_token_id;
  std::optional<int32_t> pad_token_id;
  std::optional<bool> do_sample;             // false: greedy, whatever temperature says
  std::optional<double> temperature;         // >= 0
  std::optional<double> top_p;               // in (0, 1]
  std::optional<int32_t> top_k;              // >= 0; 0: all tokens
  std::optional<double> min_p;               // in [0, 1]
  std::optional<double> repetition_penalty;  // > 0
  std::optional<int32_t> max_new_tokens;     // >= 1
};

// InvalidArgument "generation_config.json: <field>: ..." for malformed JSON or values. Fields not
// listed above are ignored, null is as good as absent.
absl::StatusOr<GenerationDefaults> ParseGenerationConfig(std::string_view json);

// Reads MODEL_DIR/generation_config.json; where there is none, nothing is set.
absl::StatusOr<GenerationDefaults> LoadGenerationConfig(const std::string& model_dir);

}  // namespace tandem
