// A Hugging Face config.json as a validated description of a decoder: all that the forward pass,
// the loader and the KV layout need to know of a model. Which family has which parts is
// model_family.h's. Here, not in engine/, because the router and the command line need it too and
// may not see the engine.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/checkpoint_quantisation.h"
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

// Llama 3.1's scaling ("llama3" in transformers): slow rotations are divided by `factor`, fast ones
// stay, and those between `low_freq_factor` and `high_freq_factor` turns over the original length
// are mixed.
struct Llama3Scaling {
  float factor = 1;
  float low_freq_factor = 1;
  float high_freq_factor = 4;
  int original_max_position_embeddings = 0;
};

// monostate: plain rotary positions.
using RopeScaling = std::variant<std::monostate, YarnScaling, Llama3Scaling>;

struct ModelConfig {
  std::string architecture;  // one of ModelFamilies()
  int vocab_size = 0;        // rows of the embedding, padding included
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;  // independent of hidden_size / num_heads
  int max_position_embeddings = 0;
  bool qkv_bias = false;     // q, k and v projections
  bool output_bias = false;  // attention's output projection
  bool mlp_bias = false;     // gate, up and down projections
  bool qk_norm = false;      // RMSNorm over each head of q and k, before rotation
  bool tie_word_embeddings = false;
  float rms_norm_eps = 1e-6f;  // of every norm
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  DType checkpoint_dtype = DType::kBFloat16;           // dtype or torch_dtype
  std::optional<CheckpointQuantisation> quantisation;  // of linear layers; none: not quantised
  std::vector<int32_t> eos_token_ids;                  // generation_config.json overrides

  // Reads and validates MODEL_DIR/config.json, and what says of the quantisation where that does
  // not. Errors name the key, what it holds and what is supported.
  static absl::StatusOr<ModelConfig> Load(const std::string& model_dir);
  static absl::StatusOr<ModelConfig> Parse(const std::string& json, const std::string& origin);

  // Number of parameters; tied embeddings count once.
  int64_t NumParameters() const;
  // Bytes of the weights on a device that keeps those of 4 bits as they are, beside a word for each
  // of their groups; the others in `dtype`.
  int64_t KeptWeightBytes(DType dtype) const;
  KvLayout LayoutFor(int block_size, DType kv_dtype) const {
    return KvLayout{num_layers, num_kv_heads, head_dim, block_size, kv_dtype};
  }
  // The longest sequence that the positions are defined for: max_position_embeddings, or with YaRN
  // at least factor * original_max_position_embeddings.
  int MaxModelLen() const;
};

// "YaRN, factor 4", "llama3, factor 8" or "none", for people.
std::string DescribeRopeScaling(const RopeScaling& scaling);

}  // namespace tandem
