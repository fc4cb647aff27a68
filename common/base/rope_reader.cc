#include "common/base/rope_reader.h"

#include <string_view>

#include "fmt/format.h"

namespace tandem {
namespace {

constexpr int kMaxPosition = 1 << 26;

// The length the model was trained for before its positions were stretched.
int OriginalLength(ConfigReader* root, ConfigReader* rope, const ModelConfig& config) {
  constexpr const char* kKey = "original_max_position_embeddings";
  if (root->Has(kKey)) return root->Int(kKey, std::nullopt, 1, kMaxPosition);
  return rope->Int(kKey, config.max_position_embeddings, 1, kMaxPosition);
}

float Factor(ConfigReader* rope) {
  return static_cast<float>(rope->Number("factor", std::nullopt, 1.0, 1024.0));
}

YarnScaling ReadYarn(ConfigReader* root, ConfigReader* rope, const ModelConfig& config) {
  YarnScaling yarn;
  yarn.factor = Factor(rope);
  yarn.original_max_position_embeddings = OriginalLength(root, rope, config);
  yarn.beta_fast = static_cast<float>(rope->Number("beta_fast", 32.0, 1e-3, 1e6));
  yarn.beta_slow = static_cast<float>(rope->Number("beta_slow", 1.0, 1e-3, 1e6));
  if (rope->Has("attention_factor")) {
    yarn.attention_factor = static_cast<float>(rope->Number("attention_factor", 1.0, 1e-3, 1e3));
  }
  for (const char* key : {"mscale", "mscale_all_dim"}) {
    if (rope->Has(key)) rope->Fail(key, "is not supported; give attention_factor instead");
  }
  if (!rope->Bool("truncate", true)) rope->Fail("truncate", "false is not supported");
  return yarn;
}

Llama3Scaling ReadLlama3(ConfigReader* root, ConfigReader* rope, const ModelConfig& config) {
  Llama3Scaling scaling;
  scaling.factor = Factor(rope);
  scaling.low_freq_factor =
      static_cast<float>(rope->Number("low_freq_factor", std::nullopt, 1e-3, 1e6));
  scaling.high_freq_factor =
      static_cast<float>(rope->Number("high_freq_factor", std::nullopt, 1e-3, 1e6));
  scaling.original_max_position_embeddings = OriginalLength(root, rope, config);
  if (rope->status().ok() && scaling.high_freq_factor <= scaling.low_freq_factor) {
    rope->Fail("high_freq_factor", fmt::format("{} must be greater than low_freq_factor {}",
                                               scaling.high_freq_factor, scaling.low_freq_factor));
  }
  return scaling;
}

void ReadScaling(ConfigReader* root, const char* key, ModelConfig* config) {
  const nlohmann::json& value = (*root)[key];
  if (!value.is_object()) return root->Fail(key, "must be an object or null");
  for (const auto& [name, part] : value.items()) {
    if (!part.is_object()) continue;
    return root->Fail(key, fmt::format("has \"{}\": positions that differ from layer to layer are "
                                       "not supported",
                                       name));
  }
  ConfigReader rope(value, root->origin() + ": " + key);
  config->rope_theta = rope.Number("rope_theta", config->rope_theta, 1.0, 1e12);
  if (rope.Number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) {
    rope.Fail("partial_rotary_factor", "must be 1: heads are rotated whole");
  }
  const std::string type = rope.String("rope_type", rope.String("type", "default"));
  if (type == "yarn") {
    config->rope_scaling = ReadYarn(root, &rope, *config);
  } else if (type == "llama3") {
    config->rope_scaling = ReadLlama3(root, &rope, *config);
  } else if (type != "default") {
    rope.Fail(rope.Has("rope_type") ? "rope_type" : "type",
              fmt::format("\"{}\" is not supported; supported are default, llama3 and yarn", type));
  }
  root->Take(rope.status());
}

}  // namespace

void ReadRope(ConfigReader* root, ModelConfig* config) {
  config->rope_theta = root->Number("rope_theta", 10000.0, 1.0, 1e12);
  if (root->Number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) {
    root->Fail("partial_rotary_factor", "must be 1: heads are rotated whole");
  }
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!root->Has(key)) continue;
    if ((*root)[key].is_object() && (*root)[key].empty()) continue;
    return ReadScaling(root, key, config);
  }
}

}  // namespace tandem
