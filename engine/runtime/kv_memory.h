// The memory of a KV pool: POSIX shared memory whose name is gone again before anyone can open it,
// so that a crash leaves nothing behind. Its descriptor can be handed to another process.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"

namespace tandem::engine {

// Movable. Pages cost memory only once they are touched.
class KvMemory {
 public:
  // RESOURCE_EXHAUSTED, naming --kv-cache-memory-bytes, where /dev/shm has less room.
  static absl::StatusOr<KvMemory> Create(size_t bytes);
  KvMemory(KvMemory&& other) noexcept;
  KvMemory& operator=(KvMemory&& other) noexcept;
  ~KvMemory();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int fd() const { return fd_; }

 private:
  KvMemory() = default;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
};

// Bytes that this process may still use: the lesser of the machine's available memory and what the
// limit of its control group leaves.
size_t AvailableMemory();
// The same for a KV pool, which must also fit into /dev/shm.
size_t AvailableKvMemory();

}  // namespace tandem::engine
