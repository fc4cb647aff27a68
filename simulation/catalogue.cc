#include "simulation/catalogue.h"

#include "absl/strings/match.h"

namespace tandem::simulation {
namespace {

constexpr double kGB = 1e9, kTera = 1e12;
constexpr double kPcie4 = 20 * kGB, kPcie5 = 40 * kGB;

Card MakeCard(const char* name, double read_gb, double tflops, int64_t memory_gib, double link,
              bool hopper = false) {
  return {name, read_gb * kGB, tflops * kTera, memory_gib << 30, link, hopper};
}

// The shape of a Qwen2, Qwen3 or Llama decoder: what the cost of a step depends on.
KnownModel MakeModel(const char* name, int layers, int hidden, int intermediate, int heads,
                     int kv_heads, int head_dim, int vocab, int positions, bool tied) {
  KnownModel model{.name = name};
  ModelConfig& c = model.config;
  c.num_layers = layers;
  c.hidden_size = hidden;
  c.intermediate_size = intermediate;
  c.num_heads = heads;
  c.num_kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.vocab_size = vocab;
  c.max_position_embeddings = positions;
  c.tie_word_embeddings = tied;
  return model;
}

template <typename Named>
const Named* FindByName(const std::vector<Named>& all, const std::string& name) {
  for (const Named& one : all) {
    if (absl::EqualsIgnoreCase(one.name, name)) return &one;
  }
  return nullptr;
}

}  // namespace

const std::vector<Card>& KnownCards() {
  static const auto* const cards = new std::vector<Card>{
      MakeCard("rtx-3090", 936, 71, 24, kPcie4),     MakeCard("rtx-4090", 1008, 165, 24, kPcie4),
      MakeCard("rtx-4090d", 1008, 165, 24, kPcie4),  MakeCard("rtx-5090", 1792, 209, 32, kPcie5),
      MakeCard("l4", 300, 121, 24, kPcie4),          MakeCard("l40s", 864, 362, 48, kPcie4),
      MakeCard("a100-40g", 1555, 312, 40, kPcie4),   MakeCard("a100", 2039, 312, 80, kPcie4),
      MakeCard("h100", 3350, 989, 80, kPcie5, true), MakeCard("h200", 4800, 989, 140, kPcie5, true),
  };
  return *cards;
}

const Card* FindCard(const std::string& name) { return FindByName(KnownCards(), name); }

const std::vector<KnownModel>& KnownModels() {
  static const auto* const models = new std::vector<KnownModel>{
      MakeModel("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, 151936, 32768, true),
      MakeModel("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 128, 151936, 32768, true),
      MakeModel("Qwen2.5-3B", 36, 2048, 11008, 16, 2, 128, 151936, 32768, true),
      MakeModel("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 128, 152064, 32768, false),
      MakeModel("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064, 32768, false),
      MakeModel("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064, 32768, false),
      MakeModel("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, 40960, false),
      MakeModel("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936, 40960, false),
      MakeModel("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 131072, false),
  };
  return *models;
}

const KnownModel* FindModel(const std::string& name) { return FindByName(KnownModels(), name); }

}  // namespace tandem::simulation
