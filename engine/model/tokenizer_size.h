// How many token ids a model's tokenizer uses, which may be fewer than its embedding has rows.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace tandem::engine {

// One more than the largest id in MODEL_DIR/tokenizer.json (model.vocab and added_tokens); 0 if
// there is no such file. Text itself is the router's business; this is only for masking.
absl::StatusOr<int> TokenizerVocabSize(const std::string& model_dir);

}  // namespace tandem::engine
