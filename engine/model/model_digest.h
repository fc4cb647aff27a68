// A name for "the same model": what prefix hashes are seeded with and what workers of one cluster
// must agree on.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

#include "engine/model/safetensors.h"

namespace tandem::engine {

// 32 hex digits over config.json, each file's name, size and safetensors header, and 64 samples of
// 4 KiB spread evenly over each file: cheap for any size, and different for any retrained
// checkpoint.
absl::StatusOr<std::string> CheckpointDigest(const std::string& model_dir,
                                             const Checkpoint& checkpoint);
// Over config.json and the seed of dummy weights.
absl::StatusOr<std::string> DummyDigest(const std::string& model_dir, uint64_t seed);

}  // namespace tandem::engine
