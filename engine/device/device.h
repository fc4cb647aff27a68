// Where a model is computed: its memory, its streams and its events. A device knows nothing of
// models; its ops are engine/kernels/ops.h, and engine/runtime/backend.h joins the two.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "engine/device/buffer.h"
#include "engine/device/event.h"
#include "engine/device/stream.h"

namespace tandem::engine {

// Thread-safe. Outlives its buffers, streams and events.
class Device {
 public:
  virtual ~Device() = default;

  // For the start-up banner: "cpu, 2 threads".
  virtual std::string Describe() const = 0;
  // Whether a stream's work goes on while the host does something else.
  virtual bool asynchronous() const = 0;
  // Whether the device reads and writes the host's memory as its own. Then staging buffers and
  // mapped files can be given to ops as they are.
  virtual bool shares_host_memory() const = 0;
  virtual bool has_bfloat16() const = 0;

  // Bytes that there are at all.
  virtual size_t TotalMemory() const = 0;
  // Bytes of it that this device has given out and not got back. Counted only where the device has
  // memory of its own.
  virtual size_t AllocatedMemory() const { return 0; }
  // Bytes that can still be allocated.
  virtual size_t AvailableMemory() const = 0;

  // Memory of the device for weights and workspaces, zeroed, aligned to 64 bytes at least.
  // RESOURCE_EXHAUSTED with the bytes wanted.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  // The same for a KV pool, in a form that other processes can be given: they ship blocks into it.
  // RESOURCE_EXHAUSTED, naming --kv-cache-memory-bytes.
  virtual absl::StatusOr<Buffer> AllocateKvPool(size_t bytes) = 0;
  // Memory of the host from which copies to the device, and to which copies from it, run
  // asynchronously. Ops can read and write it too, if slowly. Zeroed.
  virtual absl::StatusOr<Buffer> AllocateStaging(size_t bytes) = 0;

  virtual std::unique_ptr<Stream> NewStream() = 0;
  virtual std::shared_ptr<Event> NewEvent() = 0;
};

}  // namespace tandem::engine
