// A Hugging Face config.json of the Qwen2 family as validated values. Here, not in engine/, because
// the router and the command line need it too and may not see the engine.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/dtype.h"
#include "common/base/kv_layout.h"

namespace tandem {

// YaRN (Peng et al., 2023, arXiv:2309.00071), as Hugging Face transformers applies it.
struct YarnScaling {
  float factor = 1;
  int original_max_position_embeddings = 0;
  float beta_fast = 32;
  float beta_slow = 1;
  std::optional<float> attention_factor;  // unset: 0.1 ln(factor) + 1
};

struct ModelConfig {
  std::string architecture;  // Qwen2ForCausalLM
  int vocab_size = 0;        // rows of the embedding, padding included
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000.0;
  bool tie_word_embeddings = false;
  DType checkpoint_dtype = DType::kBFloat16;  // torch_dtype
  std::optional<YarnScaling> yarn;
  std::vector<int32_t> eos_token_ids;  // of config.json; generation_config.json overrides

  // Reads and validates MODEL_DIR/config.json. Errors name the key, what it holds and what is
  // supported.
  static absl::StatusOr<ModelConfig> Load(const std::string& model_dir);
  static absl::StatusOr<ModelConfig> Parse(const std::string& json, const std::string& origin);

  // Number of parameters; tied embeddings count once.
  int64_t NumParameters() const;
  KvLayout LayoutFor(int block_size, DType kv_dtype) const {
    return KvLayout{num_layers, num_kv_heads, head_dim, block_size, kv_dtype};
  }
  // The longest sequence that the positions are defined for: max_position_embeddings, or with YaRN
  // at least factor * original_max_position_embeddings.
  int MaxModelLen() const;
};

}  // namespace tandem
