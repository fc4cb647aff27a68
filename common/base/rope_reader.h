// The rotary positions of a config.json, in the forms that Hugging Face transformers wrote over the
// years:
//   rope_theta at the top and rope_scaling null, {"type": ...} or {"rope_type": ...} (up to 4.x);
//   rope_parameters {"rope_type": ..., "rope_theta": ..., ...} (from 5.0).
// Where both objects are there rope_scaling counts, as in transformers.
#pragma once

#include "common/base/config_reader.h"
#include "common/base/model_config.h"

namespace tandem {

// Fills rope_theta and rope_scaling; max_position_embeddings is read before. Errors go to `root`,
// the whole config.json.
void ReadRope(ConfigReader* root, ModelConfig* config);

}  // namespace tandem
