// Memory of a card that other processes can be given.
#pragma once

#include "absl/status/statusor.h"

#include "engine/device/buffer.h"

namespace tandem::engine::cuda {

// An allocation of CUDA's virtual memory management, mapped for the card `ordinal`, which is the
// calling thread's; its descriptor can be handed to another process. Not zeroed. UNIMPLEMENTED
// where the card or the system has no such memory, RESOURCE_EXHAUSTED where there is no room.
absl::StatusOr<Buffer> AllocateExportable(int ordinal, size_t bytes);

}  // namespace tandem::engine::cuda
