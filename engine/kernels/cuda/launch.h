// How the kernels of this folder are launched. Launchers take raw pointers, shapes and a stream,
// return the CUDA error of the launch, allocate nothing and never synchronise, so that they can be
// captured in a graph.
#pragma once

#include <array>
#include <cuda_runtime.h>
#include <mutex>
#include <optional>

namespace tandem::engine::cuda {

struct LaunchOptions {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;  // of the device
  // Of the device, that one thread block may use (cudaDevAttrMaxSharedMemoryPerBlockOptin): 163 KB
  // on sm_80, 99 KB on sm_89, 227 KB on sm_90.
  int shared_bytes = 227 << 10;
  // Start beside the predecessor in the stream (programmatic dependent launch, sm_90 and newer;
  // must be false before): the kernel fetches what does not depend on the predecessor, then waits
  // for it. Every kernel of such a chain must be one of this folder's: see ptx.cuh for the rule
  // they keep.
  bool overlap = false;
};

// A value for each device, made by the first thread that asks for it there: attributes of functions
// and what follows from them belong to the calling thread's device.
template <typename T>
class PerDevice {
 public:
  template <typename Make>  // T()
  const T& Get(const Make& make) {
    int device = 0;
    cudaGetDevice(&device);
    Entry& entry = entries_[static_cast<size_t>(device) % entries_.size()];
    std::call_once(entry.made, [&] { entry.value.emplace(make()); });
    return *entry.value;
  }

 private:
  struct Entry {
    std::once_flag made;
    std::optional<T> value;
  };
  std::array<Entry, 64> entries_;
};

// Launches kernel<<<grid, threads, shared_bytes>>>(args...).
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   const LaunchOptions& options, Arguments&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = options.stream;
  config.attrs = &attribute;
  config.numAttrs = options.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

}  // namespace tandem::engine::cuda
