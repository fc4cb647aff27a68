// The weight files of a model directory with what their headers say. Reads no weights.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/safetensors.h"

namespace tandem {

struct CheckpointFile {
  std::string path;
  size_t bytes = 0;
  SafetensorsIndex index;
};

struct CheckpointFiles {
  std::vector<CheckpointFile> files;                   // in order of their names
  std::map<std::string, size_t, std::less<>> file_of;  // tensor -> index in `files`

  // model.safetensors, or the shards that model.safetensors.index.json names, all of them there,
  // whole, and with the tensors that the index says. NOT_FOUND for a file that is missing,
  // INVALID_ARGUMENT otherwise; both name the file.
  static absl::StatusOr<CheckpointFiles> Read(const std::string& model_dir);
};

}  // namespace tandem
