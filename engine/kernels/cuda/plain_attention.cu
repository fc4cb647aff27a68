#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/item_of_row.cuh"
#include "engine/kernels/cuda/plain_attention.h"
#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kMaxHeadDim = 256;
constexpr int kTurn = 4;  // positions of a warp at a time
// Maximum of no scores; finite, so that differences stay numbers.
constexpr float kNone = -1e30f;

// Kv: elements of pages. kParts: those of a head that a lane holds: lane, lane + 32, ...
template <typename Kv, int kParts>
__global__ __launch_bounds__(kThreads) void PlainAttentionKernel(
    const __grid_constant__ PlainAttentionArgs a) {
  __shared__ float maxima[kWarps], sums[kWarps], values[kWarps][kParts * 32];
  WaitForPredecessor();
  LetSuccessorStart();
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int item = ItemOfRow(a.first_rows, a.num_items, row);
  if (a.starts[item] < 0) return;
  const int first_row = a.first_rows[item];
  const bool single = a.first_rows[item + 1] - first_row == 1;
  if (single ? a.skip_single_rows : a.only_single_rows) return;
  const int length = a.starts[item] + row - first_row + 1;
  const int32_t* blocks = a.blocks + a.first_blocks[item];
  const int kv_head = head / (a.heads / a.kv_heads);
  const int64_t page = static_cast<int64_t>(a.block_size) * a.head_dim;
  const int64_t row_offset = (static_cast<int64_t>(row) * a.heads + head) * a.head_dim;

  float query[kParts], sum[kParts] = {};
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int i = lane + p * 32;
    query[p] = i < a.head_dim ? __bfloat162float(a.q[row_offset + i]) * a.scale : 0.0f;
  }
  float maximum = kNone, weight_sum = 0;
  for (int first = warp * kTurn; first < length; first += kWarps * kTurn) {
    float scores[kTurn];
    const Kv* at[kTurn];  // the position's key
#pragma unroll
    for (int t = 0; t < kTurn; ++t) {
      const int position = min(first + t, length - 1);
      const int64_t block = blocks[position / a.block_size];
      at[t] = static_cast<const Kv*>(a.kv) + (block * 2 * a.kv_heads + kv_head) * page +
              static_cast<int64_t>(position % a.block_size) * a.head_dim;
      float score = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int i = lane + p * 32;
        if (i < a.head_dim) score += query[p] * ToFloat(at[t][i]);
      }
      scores[t] = first + t < length ? WarpSum(score) : kNone;
    }
    float larger = maximum;
#pragma unroll
    for (int t = 0; t < kTurn; ++t) larger = fmaxf(larger, scores[t]);
    const float keep = expf(maximum - larger);
    maximum = larger;
    weight_sum *= keep;
#pragma unroll
    for (int p = 0; p < kParts; ++p) sum[p] *= keep;
#pragma unroll
    for (int t = 0; t < kTurn; ++t) {
      if (first + t >= length) continue;
      const float weight = expf(scores[t] - maximum);
      weight_sum += weight;
      const Kv* value = at[t] + page * a.kv_heads;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int i = lane + p * 32;
        if (i < a.head_dim) sum[p] += weight * ToFloat(value[i]);
      }
    }
  }
  if (lane == 0) {
    maxima[warp] = maximum;
    sums[warp] = weight_sum;
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) values[warp][lane + p * 32] = sum[p];
  __syncthreads();
  float largest = kNone, total = 0;
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w]);
  for (int w = 0; w < kWarps; ++w) total += sums[w] * expf(maxima[w] - largest);
  for (int i = threadIdx.x; i < a.head_dim; i += kThreads) {
    float value = 0;
    for (int w = 0; w < kWarps; ++w) value += values[w][i] * expf(maxima[w] - largest);
    a.out[row_offset + i] = __float2bfloat16_rn(value / total);
  }
}

template <typename Kv>
cudaError_t LaunchParts(const PlainAttentionArgs& args, const LaunchOptions& options) {
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(args.heads));
  const auto kernel = args.head_dim <= 64    ? PlainAttentionKernel<Kv, 2>
                      : args.head_dim <= 128 ? PlainAttentionKernel<Kv, 4>
                                             : PlainAttentionKernel<Kv, 8>;
  return Launch(kernel, grid, kThreads, 0, options, args);
}

}  // namespace

cudaError_t PlainAttention(const PlainAttentionArgs& args, const LaunchOptions& options) {
  if (args.rows < 1 || args.head_dim < 1 || args.head_dim > kMaxHeadDim) {
    return cudaErrorInvalidValue;
  }
  return args.fp8_kv ? LaunchParts<E4M3>(args, options) : LaunchParts<__nv_bfloat16>(args, options);
}

}  // namespace tandem::engine::cuda
