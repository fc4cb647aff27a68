// The architectures that Tandem serves, by their names in Hugging Face's config.json.
//
// All of them are one decoder: RMSNorm before attention and before a gated SiLU feed-forward block,
// rotary positions, grouped-query attention over the whole context. A family says only what
// config.json leaves unsaid. Values are those of the configuration classes of transformers. To add
// one, see docs/add_a_model.md.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace tandem {

struct ModelFamily {
  std::string_view architecture;  // an entry of config.json's `architectures`
  std::string_view model_type;    // config.json's `model_type`
  std::string_view members;       // well-known models, for messages

  bool qkv_bias = false;  // q, k and v projections have a bias whatever config.json says
  bool reads_attention_bias = false;  // `attention_bias`: q, k, v and output projections have one
  bool reads_mlp_bias = false;        // `mlp_bias`: gate, up and down projections have one
  bool qk_norm = false;               // RMSNorm over each head of q and k, before rotation

  // Where config.json lacks the key.
  int head_dim = 0;  // 0: hidden_size / num_attention_heads
  int max_position_embeddings = 0;
  int sliding_window = 0;  // 0: the family has no such key

  // Whether `use_sliding_window` decides if `sliding_window` counts.
  bool has_use_sliding_window = false;
};

std::span<const ModelFamily> ModelFamilies();
// By architecture, or by model_type where `architecture` is empty; null if there is none.
const ModelFamily* FindModelFamily(std::string_view architecture, std::string_view model_type);
// "LlamaForCausalLM (Llama 3, ...), ...", for messages.
std::string KnownModelFamilies();

}  // namespace tandem
