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

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "engine/device/collective.h"
#include "engine/model/shard.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/engine.h"

namespace tandem::engine {

// Of options.tensor_parallel_size ranks. Errors as Engine::Load.
absl::StatusOr<std::unique_ptr<Engine>> LoadTensorParallel(const EngineOptions& options);

// One rank, with what it has in common with the others (engine.cc); sizes in `options` are those of
// all. `collective` outlives it; null where it is the only one.
absl::StatusOr<std::unique_ptr<Engine>> LoadRank(const EngineOptions& options, const Shard& shard,
                                                 Collective* collective);

// INTERNAL names the first item of a step for which `rank` drew other tokens than rank 0, those
// behind a draft's included: the logits are the same bits, or a rank is broken.
absl::Status CheckAgreement(const StepOutput& first, const StepOutput& other, size_t rank);

}  // namespace tandem::engine
