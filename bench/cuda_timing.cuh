// How the benches of single kernels time, and the read ceiling that they stand beside.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "engine/kernels/cuda/launch.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {

// Median milliseconds of `runs` replays of what `record` launches, captured as a graph.
inline double MedianMs(cudaStream_t stream, int runs, const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  TANDEM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record();
  TANDEM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  TANDEM_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<cudaEvent_t> events(static_cast<size_t>(runs) + 1);
  for (cudaEvent_t& event : events) TANDEM_CUDA_CHECK(cudaEventCreate(&event));
  for (int i = 0; i < 3; ++i) TANDEM_CUDA_CHECK(cudaGraphLaunch(exec, stream));
  TANDEM_CUDA_CHECK(cudaEventRecord(events[0], stream));
  for (size_t i = 1; i < events.size(); ++i) {
    TANDEM_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    TANDEM_CUDA_CHECK(cudaEventRecord(events[i], stream));
  }
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(stream));
  std::vector<float> times(static_cast<size_t>(runs));
  for (size_t i = 0; i < times.size(); ++i) {
    TANDEM_CUDA_CHECK(cudaEventElapsedTime(&times[i], events[i], events[i + 1]));
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Every thread reads 16 bytes a turn, four turns in flight.
static __global__ void ReadKernel(const uint4* data, size_t count, unsigned* sink) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  unsigned mixed = 0;
  size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + i + static_cast<size_t>(j) * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) mixed ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (mixed == 0x12345678u) *sink = mixed;
}

// Bytes per second of reading 4 GB of random data: the best of some grids, of each the median.
inline double ReadBandwidth(cudaStream_t stream, const LaunchOptions& options) {
  constexpr size_t kBytes = 4ull << 30;
  DeviceArray<uint4> data(kBytes / sizeof(uint4));
  FillRandom(reinterpret_cast<float*>(data.get()), kBytes / 4, 7);
  DeviceArray<unsigned> sink(1);
  double best = 0;
  for (const int blocks : {2, 4, 8, 16}) {
    const double ms = MedianMs(stream, 9, [&] {
      ReadKernel<<<options.multiprocessors * blocks, 512, 0, stream>>>(data.get(), data.size(),
                                                                       sink.get());
    });
    best = std::max(best, kBytes / (ms * 1e-3));
  }
  return best;
}

}  // namespace tandem::engine::cuda
