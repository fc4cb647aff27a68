// Ranks of one process on NVIDIA GPUs whose memory each of them can read: sums by rank_sum.h.
//
// Where every rank has a card of its own they wait for each other in kernels, which can be
// recorded. Ranks that share a card wait in its streams, by events that the host arranges; and all
// their work is given to one stream, since kernels whose thread blocks wait for each other
// (hopper_linear.h) must not run beside others of their kind. That is slower, and for tests.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"

#include "engine/device/collective.h"
#include "engine/device/cuda/cuda_device.h"

namespace tandem::engine::cuda {

// A rank on each of the devices, which outlive their use and have given out nothing yet.
// INVALID_ARGUMENT where they are too many or of several kinds, FAILED_PRECONDITION where two
// cannot read each other's memory.
absl::StatusOr<std::unique_ptr<Ranks>> MakeCudaRanks(std::span<CudaDevice* const> devices);

}  // namespace tandem::engine::cuda
