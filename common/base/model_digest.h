// A name for "the same model": what prefix hashes are seeded with, what workers of one cluster must
// agree on, and what the router demands of them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace tandem {

// 32 hex digits over config.json, what older tools say of the quantisation beside it, each weight
// file's name, size and safetensors header, and 64 samples of 4 KiB spread evenly over each file:
// cheap for any size, and different for any retrained checkpoint. NOT_FOUND where weight files are
// missing; INVALID_ARGUMENT for one that is no safetensors file.
absl::StatusOr<std::string> CheckpointDigest(const std::string& model_dir);
// Over config.json and the seed of dummy weights.
absl::StatusOr<std::string> DummyDigest(const std::string& model_dir, uint64_t seed);

}  // namespace tandem
