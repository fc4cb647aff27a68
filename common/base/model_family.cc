#include "common/base/model_family.h"

#include "fmt/format.h"

namespace tandem {
namespace {

constexpr ModelFamily kFamilies[] = {
    {.architecture = "LlamaForCausalLM",
     .model_type = "llama",
     .members = "Llama 3, 3.1, 3.2, 3.3",
     .reads_attention_bias = true,
     .reads_mlp_bias = true,
     .max_position_embeddings = 2048},
    {.architecture = "MistralForCausalLM",
     .model_type = "mistral",
     .members = "Mistral Nemo",
     .max_position_embeddings = 131072,
     .sliding_window = 4096},
    {.architecture = "Qwen2ForCausalLM",
     .model_type = "qwen2",
     .members = "Qwen1.5, Qwen2, Qwen2.5",
     .qkv_bias = true,
     .max_position_embeddings = 32768,
     .has_use_sliding_window = true},
    {.architecture = "Qwen3ForCausalLM",
     .model_type = "qwen3",
     .members = "Qwen3, dense",
     .reads_attention_bias = true,
     .qk_norm = true,
     .head_dim = 128,
     .max_position_embeddings = 32768,
     .has_use_sliding_window = true},
};

}  // namespace

std::span<const ModelFamily> ModelFamilies() { return kFamilies; }

const ModelFamily* FindModelFamily(std::string_view architecture, std::string_view model_type) {
  for (const ModelFamily& family : kFamilies) {
    const bool same = architecture.empty() ? family.model_type == model_type
                                           : family.architecture == architecture;
    if (same) return &family;
  }
  return nullptr;
}

std::string KnownModelFamilies() {
  std::string text;
  for (const ModelFamily& family : kFamilies) {
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", family.architecture, family.members);
  }
  return text;
}

}  // namespace tandem
