#include "engine/kernels/cuda/argmax.cuh"
#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/step.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sum over the thread block, the same in every thread.
__device__ int64_t BlockSum(int64_t value, int64_t* shared) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

__device__ float BlockSum(float value, float* shared) {
  value = WarpSum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

__device__ int TilesOf(int length) { return (length + kAttentionTile - 1) / kAttentionTile; }

__device__ void WriteTileStart(const PrepareStepArgs& a, int row, int64_t* shared) {
  int64_t before = 0;
  for (int i = threadIdx.x; i < row; i += kThreads) before += TilesOf(a.lengths[i]);
  before = BlockSum(before, shared);
  if (threadIdx.x != 0) return;
  a.tile_starts[row] = static_cast<int32_t>(before);
  if (row + 1 == a.rows) {
    a.tile_starts[a.rows] = static_cast<int32_t>(before) + TilesOf(a.lengths[row]);
  }
}

// One thread block per row.
__global__ __launch_bounds__(kThreads) void PrepareStepKernel(
    const __grid_constant__ PrepareStepArgs a) {
  __shared__ int64_t shared[kWarps];
  WaitForPredecessor();
  LetSuccessorStart();
  const int row = static_cast<int>(blockIdx.x), position = a.lengths[row] - 1;
  WriteTileStart(a, row, shared);
  const int half = a.head_dim / 2;
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float angle = static_cast<float>(position) * a.frequencies[i];
    a.cos[row * half + i] = cosf(angle) * a.rope_scale;
    a.sin[row * half + i] = sinf(angle) * a.rope_scale;
  }
  if (threadIdx.x == 0) {
    const int64_t block =
        a.block_tables[static_cast<int64_t>(row) * a.block_table_stride + position / a.block_size];
    a.slots[row] = (block * 2 * a.kv_heads * a.block_size + position % a.block_size) * a.head_dim;
  }
  const __nv_bfloat16* embedding = a.embedding + static_cast<int64_t>(a.tokens[row]) * a.hidden;
  float squares = 0;
  for (int i = threadIdx.x; i < a.hidden; i += kThreads) {
    const float value = __bfloat162float(embedding[i]);
    const int64_t at = static_cast<int64_t>(row) * a.hidden + i;
    a.residual[at] = value;
    a.scaled[at] = __float2bfloat16_rn(value * a.norm_weight[i]);
    squares += value * value;
  }
  if (a.square_shares == nullptr) return;
  squares = BlockSum(squares, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) a.square_shares[row] = squares;
}

// One thread block per row.
__global__ __launch_bounds__(kThreads) void SelectGreedyKernel(const uint64_t* best, int parts,
                                                               int32_t* tokens) {
  __shared__ uint64_t shared[kWarps];
  WaitForPredecessor();
  LetSuccessorStart();
  const int row = static_cast<int>(blockIdx.x);
  uint64_t winner = 0;
#pragma unroll 8
  for (int part = threadIdx.x; part < parts; part += kThreads) {
    const uint64_t other = __ldcg(best + part * kMaxSkinnyRows + row);
    winner = winner > other ? winner : other;
  }
  winner = WarpBest(winner);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = winner;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) winner = winner > shared[i] ? winner : shared[i];
  tokens[row] = IsNanRank(winner) ? -1 : TokenOfRank(winner);
}

}  // namespace

cudaError_t PrepareStep(const PrepareStepArgs& args, const LaunchOptions& options) {
  if (args.rows < 1) return cudaErrorInvalidValue;
  return Launch(PrepareStepKernel, dim3(static_cast<unsigned>(args.rows)), kThreads, 0, options,
                args);
}

cudaError_t SelectGreedy(const uint64_t* best, int parts, int rows, int32_t* tokens,
                         const LaunchOptions& options) {
  if (rows < 1) return cudaErrorInvalidValue;
  return Launch(SelectGreedyKernel, dim3(static_cast<unsigned>(rows)), kThreads, 0, options, best,
                parts, tokens);
}

}  // namespace tandem::engine::cuda
