// What the router knows of the model it serves, from its model directory: no weights.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"
#include "common/text/chat_template.h"
#include "common/text/generation_config.h"
#include "common/text/tokenizer.h"

namespace tandem::router {

// Immutable after Load, thread-safe.
struct ServedModel {
  std::string name;
  ModelConfig config;
  GenerationDefaults defaults;
  std::vector<int32_t> eos_token_ids;          // generation_config.json's, else config.json's
  std::shared_ptr<const Tokenizer> tokenizer;  // null: the checkpoint has no tokenizer.json
  std::string tokenizer_digest;                // of tokenizer.json's bytes; empty without one
  ChatTemplate chat_template;                  // renders nothing where there is no template

  // `name` empty: the directory's last component. Errors name the file and what is wrong in it.
  static absl::StatusOr<ServedModel> Load(const std::string& model_dir, const std::string& name);
};

}  // namespace tandem::router
