// Checkpoints with reference results: reference.json beside the weights, computed by Hugging Face
// transformers in float64.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace tandem::engine {

struct ReferenceCase {
  std::vector<int32_t> prompt;
  std::vector<float> first_logits;     // at the prompt's last position
  std::vector<int32_t> greedy;         // tokens
  std::vector<float> greedy_logprobs;  // of those
  std::vector<float> prompt_logprobs;  // of prompt positions 1, 2, ...
  float min_margin = 0;                // smallest gap between the two best logits on the way
};

inline nlohmann::json LoadReference(const std::string& model_dir) {
  std::ifstream file(model_dir + "/reference.json");
  return nlohmann::json::parse(file, nullptr, false);
}

inline std::vector<ReferenceCase> LoadReferenceCases(const std::string& model_dir) {
  const nlohmann::json root = LoadReference(model_dir);
  std::vector<ReferenceCase> cases;
  for (const nlohmann::json& c : root.value("cases", nlohmann::json::array())) {
    cases.push_back({c["prompt_token_ids"], c["first_logits"], c["greedy"], c["greedy_logprobs"],
                     c["prompt_logprobs"], c["min_margin"]});
  }
  return cases;
}

// Folders under `dir` that hold a reference.json.
inline std::vector<std::string> ReferenceModels(const std::string& dir) {
  std::vector<std::string> models;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (std::filesystem::exists(entry.path() / "reference.json")) models.push_back(entry.path());
  }
  return models;
}

}  // namespace tandem::engine
