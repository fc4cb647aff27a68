#include "engine/model/rope_of.h"

#include "engine/kernels/rope.h"

namespace tandem::engine {

ModelRope RopeOf(const ModelConfig& config) {
  if (const auto* yarn = std::get_if<YarnScaling>(&config.rope_scaling)) {
    const RopeYarn scaling{yarn->factor, yarn->original_max_position_embeddings, yarn->beta_fast,
                           yarn->beta_slow};
    return {RopeFrequenciesYarn(config.head_dim, config.rope_theta, scaling),
            yarn->attention_factor.value_or(YarnAttentionFactor(yarn->factor))};
  }
  if (const auto* llama3 = std::get_if<Llama3Scaling>(&config.rope_scaling)) {
    const RopeLlama3 scaling{llama3->factor, llama3->low_freq_factor, llama3->high_freq_factor,
                             llama3->original_max_position_embeddings};
    return {RopeFrequenciesLlama3(config.head_dim, config.rope_theta, scaling), 1.0f};
  }
  return {RopeFrequencies(config.head_dim, config.rope_theta), 1.0f};
}

}  // namespace tandem::engine
