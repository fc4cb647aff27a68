// The weight files of a model directory, by their names alone.
#pragma once

#include <map>
#include <set>
#include <string>

#include "absl/status/statusor.h"

namespace tandem {

struct WeightFiles {
  std::set<std::string> names;                 // in the directory
  std::map<std::string, std::string> file_of;  // tensor -> name; empty for a single file
};

// model.safetensors, or the shards that model.safetensors.index.json names: whether those are there
// is not looked at. NOT_FOUND where the directory has neither.
absl::StatusOr<WeightFiles> ListWeightFiles(const std::string& model_dir);

}  // namespace tandem
