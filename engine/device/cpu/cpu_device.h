// The host's own processors as a device. Streams do their work at once, on the calling thread and a
// team of compute threads; an event is true as soon as it is recorded.
#pragma once

#include <memory>
#include <string>

#include "engine/device/cpu/threads.h"
#include "engine/device/device.h"

namespace tandem::engine {

struct CpuDeviceOptions {
  int num_threads = 0;  // compute threads; 0: one per physical core
};

// Thread-safe, but for the threads: they serve one stream at a time.
class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const CpuDeviceOptions& options);

  // What ops of this device compute on.
  Threads& threads() { return threads_; }

  std::string Describe() const override;
  bool asynchronous() const override { return false; }
  bool shares_host_memory() const override { return true; }
  bool has_bfloat16() const override;
  size_t TotalMemory() const override;
  size_t AvailableMemory() const override;
  // Huge pages where the kernel gives them; pages cost memory only once they are touched.
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  // Anonymous shared memory (memfd), which needs no file system and ends with its last user.
  absl::StatusOr<Buffer> AllocateKvPool(size_t bytes) override;
  absl::StatusOr<Buffer> AllocateStaging(size_t bytes) override { return Allocate(bytes); }
  std::unique_ptr<Stream> NewStream() override;
  std::shared_ptr<Event> NewEvent() override;

 private:
  Threads threads_;
};

}  // namespace tandem::engine
