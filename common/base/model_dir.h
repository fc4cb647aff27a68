// Where a model's files are, as people name it, and what it is called.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace tandem {

// Replaces a folder of the Hugging Face cache (.../models--ORG--NAME) by the snapshot in it that
// refs/main names, or the only one there is; and ORG/NAME, where no such directory exists, by that
// model's snapshot in the cache ($HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub).
// All else stays as it is, to be judged by who reads it. Error: a cache folder without a snapshot
// to choose.
absl::Status ResolveModelDir(const std::string& flag, std::string* dir);

// What clients call the model of a directory where --served-model-name says nothing: ORG/NAME in
// the Hugging Face cache, else the directory's own name.
std::string DefaultModelName(const std::string& dir);

}  // namespace tandem
