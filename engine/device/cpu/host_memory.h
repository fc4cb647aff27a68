// The host's memory: how much of it is left, and memory to share with other processes.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"

#include "engine/device/buffer.h"

namespace tandem::engine {

// Bytes that the machine has, or the limit of this process's control group where that is less.
size_t TotalHostMemory();
// Bytes that this process may still use: the lesser of the machine's available memory and what the
// limit of its control group leaves.
size_t AvailableHostMemory();
// The same for shared memory, which must also fit into /dev/shm.
size_t AvailableSharedMemory();

// Zeroed POSIX shared memory whose name is gone again before anyone can open it, so that a crash
// leaves nothing behind; the buffer's descriptor can be handed to another process. Pages cost
// memory only once they are touched. RESOURCE_EXHAUSTED, naming --kv-cache-memory-bytes, where
// /dev/shm has less room.
absl::StatusOr<Buffer> AllocateSharedMemory(size_t bytes);

}  // namespace tandem::engine
