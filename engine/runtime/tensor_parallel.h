// Tensor parallelism: a model that is split over ranks (engine/model/shard.h), behind one Engine.
//
// Each rank is an engine of its own, with its own device, its part of the weights and its piece of
// the KV pool: the pages of its heads. All ranks are given the same batches and take the same steps
// on threads of their own; in every layer their outputs are added up (Collective). Logits and draws
// are every rank's, from the same bits, so no rank has to tell another what was drawn.
//
// To the loops there is one pool and one prefix cache: a block is a block of every rank.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "engine/device/collective.h"
#include "engine/model/shard.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/engine.h"

namespace tandem::engine {

// A rank before anything of it is loaded.
struct Rank {
  Shard shard;
  std::shared_ptr<Backend> backend;
  // Of its device's memory, when all ranks had opened theirs.
  size_t used_before = 0;
  int on_device = 1;                 // ranks that share the device
  Collective* collective = nullptr;  // outlives the rank; null: it is the only one
};

// options.tensor_parallel_size of them, each on its device, without collectives.
absl::StatusOr<std::vector<Rank>> OpenRanks(const EngineOptions& options);

// The GPUs of the ranks: --devices, or --gpu and those that follow it. INVALID_ARGUMENT names the
// flag.
absl::StatusOr<std::vector<int>> DevicesOf(const EngineOptions& options);

// Of options.tensor_parallel_size ranks. Errors as Engine::Load.
absl::StatusOr<std::unique_ptr<Engine>> LoadTensorParallel(const EngineOptions& options);

// One rank (engine.cc); sizes in `options` are those of all.
absl::StatusOr<std::unique_ptr<Engine>> LoadRank(const EngineOptions& options, Rank rank);

// INTERNAL names the first item of a step for which `rank` drew other tokens than rank 0, those
// behind a draft's included: the logits are the same bits, or a rank is broken.
absl::Status CheckAgreement(const StepOutput& first, const StepOutput& other, size_t rank);

}  // namespace tandem::engine
