// One CUDA card: its memory, streams and events.
//
// Errors in the middle of the work end the process (cuda_check.h). For tests of what happens then,
// the environment variable TANDEM_CUDA_FAULT_STEP=n makes step n of a runner such an error (those
// of the start, two at most, are of a runner of their own).
#pragma once

#include <atomic>
#include <cuda_runtime.h>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/status/statusor.h"

#include "engine/device/device.h"

namespace tandem::engine::cuda {

// FAILED_PRECONDITION with the fix where `driver`, the newest CUDA that the machine's driver knows
// (as 1000 * major + 10 * minor; 0: there is no driver), is too old for the CUDA that this program
// was built with.
absl::Status CheckDriver(int driver, int built_with);
// FAILED_PRECONDITION where a card has no bfloat16 arithmetic (compute capability below 8.0).
absl::Status CheckCard(const std::string& name, int compute_capability);

// Work runs in order, and beside the work of all other streams but for those of one handle.
class CudaStream final : public Stream {
 public:
  using SharedHandle = std::shared_ptr<std::remove_pointer_t<cudaStream_t>>;
  static SharedHandle NewHandle(int ordinal);

  CudaStream(int ordinal, SharedHandle handle) : ordinal_(ordinal), stream_(std::move(handle)) {}

  cudaStream_t handle() const { return stream_.get(); }

  void BeginStep(int64_t step) override;
  void CopyToDevice(void* to, const void* from, size_t bytes) override;
  void CopyToHost(void* to, const void* from, size_t bytes) override;
  void Record(Event* event) override;
  std::unique_ptr<Graph> Capture(const std::function<void()>& work) override;
  void Launch(Graph* graph) override;
  void Synchronize() override;

 private:
  const int ordinal_;
  const SharedHandle stream_;
};

// Thread-safe; any thread may use it and its events.
class CudaDevice final : public Device {
 public:
  // Of the cards that CUDA_VISIBLE_DEVICES leaves. Errors say in one line what the machine lacks:
  // a driver, a newer driver, a card, a newer card.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Open(int ordinal);
  ~CudaDevice() override;

  int ordinal() const { return ordinal_; }
  int multiprocessors() const { return properties_.multiProcessorCount; }
  int compute_capability() const { return 10 * properties_.major + properties_.minor; }  // 90
  // Makes the card the calling thread's: what launches kernels or calls the runtime itself needs
  // it once. Costs next to nothing where it is already.
  void Use() const;
  // Whether the same kernels compute the same bits on both.
  bool IsOfKind(const CudaDevice& other) const;
  // From now on all streams of this and of `other`, which is the same card, are one: their work
  // does not run side by side. Before either is used by a second thread.
  void ShareStream(CudaDevice* other);

  std::string Describe() const override;
  bool asynchronous() const override { return true; }
  bool shares_host_memory() const override { return false; }
  bool has_bfloat16() const override { return true; }
  size_t TotalMemory() const override;
  size_t AllocatedMemory() const override { return *allocated_; }
  // What no process uses.
  size_t AvailableMemory() const override;
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  // The buffer's descriptor exports the memory (cuMemImportFromShareableHandle maps it in another
  // process; mmap cannot). -1 on cards without virtual memory management, whose pool is this
  // process's alone.
  absl::StatusOr<Buffer> AllocateKvPool(size_t bytes) override;
  // Page-locked, and readable by the kernels of every card.
  absl::StatusOr<Buffer> AllocateStaging(size_t bytes) override;
  std::unique_ptr<Stream> NewStream() override;
  std::shared_ptr<Event> NewEvent() override;

 private:
  class EventPool;
  class CudaEvent;
  friend class CudaStream;

  // `buffer` of `bytes`, counted until it ends.
  Buffer Counted(Buffer buffer);

  CudaDevice(int ordinal, const cudaDeviceProp& properties, int driver_version);

  const int ordinal_;
  const cudaDeviceProp properties_;
  const int driver_version_;
  const std::shared_ptr<EventPool> events_;
  CudaStream::SharedHandle common_stream_;                // null: every stream has its own
  const std::shared_ptr<std::atomic<size_t>> allocated_;  // bytes; its buffers count it down
};

}  // namespace tandem::engine::cuda
