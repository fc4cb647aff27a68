// The rotary positions that a model's description asks for.
#pragma once

#include <vector>

#include "common/base/model_config.h"

namespace tandem::engine {

struct ModelRope {
  std::vector<float> frequencies;  // [head_dim / 2], radians per position
  float scale = 1;                 // of cosines and sines
};

ModelRope RopeOf(const ModelConfig& config);

}  // namespace tandem::engine
