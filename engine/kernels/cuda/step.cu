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

// Positions that decode attention reads for an item: none of items with several rows, and of
// padding.
__device__ int DecodeLength(const PrepareStepArgs& a, int item) {
  const int start = a.starts[item];
  return start >= 0 && a.first_rows[item + 1] - a.first_rows[item] == 1 ? start + 1 : 0;
}

__device__ int TilesOf(int length) { return (length + kAttentionTile - 1) / kAttentionTile; }

__device__ void WriteDecodeItem(const PrepareStepArgs& a, int item, int64_t* shared) {
  int64_t before = 0;
  for (int i = threadIdx.x; i < item; i += kThreads) before += TilesOf(DecodeLength(a, i));
  before = BlockSum(before, shared);
  if (threadIdx.x != 0) return;
  const int first_tile = static_cast<int>(before), length = DecodeLength(a, item);
  a.decode_items[item] = {first_tile, length, a.first_blocks[item], a.first_rows[item]};
  if (item + 1 == a.items) a.decode_items[a.items] = {first_tile + TilesOf(length), 0, 0, 0};
}

// The item whose run holds the row, the same in every thread.
__device__ int ItemOfRow(const PrepareStepArgs& a, int row, int* shared) {
  for (int i = threadIdx.x; i < a.items; i += kThreads) {
    if (a.first_rows[i] <= row && row < a.first_rows[i + 1]) *shared = i;
  }
  __syncthreads();
  return *shared;
}

// One thread block per row. The successor does not start beside it: where some multiprocessors are
// taken by these few thread blocks, others would get two of the successor's, and in a chain of
// kernels that start beside each other that lasts for the rest of the step.
__global__ __launch_bounds__(kThreads) void PrepareStepKernel(
    const __grid_constant__ PrepareStepArgs a) {
  __shared__ int64_t shared[kWarps];
  __shared__ int shared_item;
  WaitForPredecessor();
  const int row = static_cast<int>(blockIdx.x);
  // Every item has a row of its own, so that there are enough thread blocks.
  if (a.decode_items != nullptr && row < a.items) WriteDecodeItem(a, row, shared);
  const int item = ItemOfRow(a, row, &shared_item);
  const bool exists = a.starts[item] >= 0;
  const int position = exists ? a.positions[row] : 0;
  const int half = a.head_dim / 2;
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float angle = static_cast<float>(position) * a.frequencies[i];
    a.cos[row * half + i] = cosf(angle) * a.rope_scale;
    a.sin[row * half + i] = sinf(angle) * a.rope_scale;
  }
  if (threadIdx.x == 0) {
    int64_t slot = -1;
    if (exists) {
      const int64_t block = a.blocks[a.first_blocks[item] + position / a.block_size];
      slot = (block * 2 * a.kv_heads * a.block_size + position % a.block_size) * a.head_dim;
    }
    a.slots[row] = slot;
  }
  int token = exists ? a.token_ids[row] : 0;
  if (token < 0) token = a.drawn[-1 - token];  // ResolveId of engine/kernels/ops.h
  const __nv_bfloat16* embedding = a.embedding + static_cast<int64_t>(token) * a.hidden;
  float squares = 0;
  constexpr int kAtOnce = 8;  // on their way, before any is stored
  for (int first = threadIdx.x; first < a.hidden; first += kAtOnce * kThreads) {
    float values[kAtOnce], weights[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      values[k] = exists && i < a.hidden ? __bfloat162float(embedding[i]) : 0.0f;
      weights[k] = i < a.hidden ? a.norm_weight[i] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      if (i >= a.hidden) continue;
      const int64_t at = static_cast<int64_t>(row) * a.hidden + i;
      a.residual[at] = values[k];
      a.scaled[at] = __float2bfloat16_rn(values[k] * weights[k]);
      squares += values[k] * values[k];
    }
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
  if (args.rows < 1 || args.items < 1 || args.items > args.rows) return cudaErrorInvalidValue;
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
