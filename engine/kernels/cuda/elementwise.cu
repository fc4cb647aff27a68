#include <cuda_fp16.h>

#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/item_of_row.cuh"
#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxHeadDim = 256;

// Sum over the thread block, the same in every thread.
__device__ float BlockSum(float value) {
  __shared__ float shared[kWarps];
  value = WarpSum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  return sum;
}

__device__ float LoadEmbedding(const BeginStepArgs& a, int64_t index) {
  if (a.embedding_kind == 0) return static_cast<const float*>(a.embedding)[index];
  if (a.embedding_kind == 1) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(a.embedding)[index]);
  }
  return __half2float(static_cast<const __half*>(a.embedding)[index]);
}

// One thread block per row. The successor does not start beside it: see PrepareStepKernel.
__global__ __launch_bounds__(kThreads) void BeginStepKernel(
    const __grid_constant__ BeginStepArgs a) {
  __shared__ int shared_position, shared_token;
  WaitForPredecessor();
  const int row = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    const int item = ItemOfRow(a.first_rows, a.items, row);
    const bool padding = a.starts[item] < 0;
    const int position = padding ? 0 : a.positions[row];
    int token = a.token_ids[row];
    if (token < 0) token = a.drawn != nullptr ? a.drawn[-1 - token] : 0;
    // Ids were checked on the host, and draws are of the vocabulary: this is for padding.
    shared_token = padding || token < 0 || token >= a.vocab ? 0 : token;
    shared_position = position;
    int64_t slot = -1;
    if (!padding) {
      const int64_t block = a.blocks[a.first_blocks[item] + position / a.block_size];
      slot = (block * 2 * a.kv_heads * a.block_size + position % a.block_size) * a.head_dim;
    }
    a.slots[row] = slot;
  }
  __syncthreads();
  const int position = shared_position, half = a.head_dim / 2;
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float angle = __fmul_rn(static_cast<float>(position), a.frequencies[i]);
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    a.cos[static_cast<int64_t>(row) * half + i] = cosine * a.rope_scale;
    a.sin[static_cast<int64_t>(row) * half + i] = sine * a.rope_scale;
  }
  const int64_t from = static_cast<int64_t>(shared_token) * a.hidden;
  const int64_t to = static_cast<int64_t>(row) * a.hidden;
  float squares = 0;
  for (int i = threadIdx.x; i < a.hidden; i += kThreads) {
    const float value = LoadEmbedding(a, from + i);
    a.residual[to + i] = value;
    if (a.scaled != nullptr) a.scaled[to + i] = __float2bfloat16_rn(value * a.norm_weight[i]);
    squares += value * value;
  }
  if (a.squares == nullptr) return;
  squares = BlockSum(squares);
  if (threadIdx.x == 0) a.squares[row] = squares;
}

// One thread block per row. kVector: floats a thread takes at once. The row is read twice: the
// second time it comes from a cache.
template <int kVector>
__global__ __launch_bounds__(kThreads) void RmsNormKernel(const float* x, const int32_t* row_ids,
                                                          const float* weight, float epsilon,
                                                          int width, __nv_bfloat16* out) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int row = static_cast<int>(blockIdx.x);
  x += static_cast<int64_t>(row_ids != nullptr ? row_ids[row] : row) * width;
  out += static_cast<int64_t>(row) * width;
  float squares = 0;
  for (int i = threadIdx.x * kVector; i < width; i += kThreads * kVector) {
    if constexpr (kVector == 4) {
      const float4 v = *reinterpret_cast<const float4*>(x + i);
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    } else {
      squares += x[i] * x[i];
    }
  }
  const float scale = rsqrtf(BlockSum(squares) / static_cast<float>(width) + epsilon);
  for (int i = threadIdx.x * kVector; i < width; i += kThreads * kVector) {
    if constexpr (kVector == 4) {
      const float4 v = *reinterpret_cast<const float4*>(x + i);
      const float4 w = *reinterpret_cast<const float4*>(weight + i);
      uint2 packed;
      packed.x = PackBFloat16(v.x * scale * w.x, v.y * scale * w.y);
      packed.y = PackBFloat16(v.z * scale * w.z, v.w * scale * w.w);
      *reinterpret_cast<uint2*>(out + i) = packed;
    } else {
      out[i] = __float2bfloat16_rn(x[i] * scale * weight[i]);
    }
  }
}

// As RmsNormKernel, with the norm left undone. The successor does not start beside it: see
// PrepareStepKernel.
template <int kVector>
__global__ __launch_bounds__(kThreads) void ScaleRowsKernel(const float* x, const int32_t* row_ids,
                                                            const float* weight, int width,
                                                            __nv_bfloat16* scaled,
                                                            float* square_sums) {
  WaitForPredecessor();
  const int row = static_cast<int>(blockIdx.x);
  x += static_cast<int64_t>(row_ids != nullptr ? row_ids[row] : row) * width;
  scaled += static_cast<int64_t>(row) * width;
  float squares = 0;
  for (int i = threadIdx.x * kVector; i < width; i += kThreads * kVector) {
    if constexpr (kVector == 4) {
      const float4 v = *reinterpret_cast<const float4*>(x + i);
      const float4 w = *reinterpret_cast<const float4*>(weight + i);
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      uint2 packed;
      packed.x = PackBFloat16(v.x * w.x, v.y * w.y);
      packed.y = PackBFloat16(v.z * w.z, v.w * w.w);
      *reinterpret_cast<uint2*>(scaled + i) = packed;
    } else {
      squares += x[i] * x[i];
      scaled[i] = __float2bfloat16_rn(x[i] * weight[i]);
    }
  }
  squares = BlockSum(squares);
  if (threadIdx.x == 0) square_sums[row] = squares;
}

// A thread block per row, `pieces` of T.
template <typename T>
__global__ __launch_bounds__(kThreads) void CopyRowsKernel(const T* from, const int32_t* row_ids,
                                                           int64_t pieces, T* to) {
  WaitForPredecessor();
  from += row_ids[blockIdx.x] * pieces;
  to += blockIdx.x * pieces;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) to[i] = from[i];
}

// One warp per (row, head): queries, then keys, then values.
__global__ __launch_bounds__(kThreads) void FinishQkvKernel(
    const __grid_constant__ FinishQkvArgs a) {
  constexpr int kPairs = kMaxHeadDim / 2 / 32;  // of a lane
  WaitForPredecessor();
  LetSuccessorStart();
  const int all_heads = a.heads + 2 * a.kv_heads, half = a.head_dim / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int row = static_cast<int>(unit / all_heads), head = static_cast<int>(unit % all_heads);
  if (row >= a.rows) return;
  const float* from = a.qkv + unit * a.head_dim;
  const float* bias =
      a.bias != nullptr ? a.bias + static_cast<int64_t>(head) * a.head_dim : nullptr;
  float low[kPairs], high[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + p * 32;
    low[p] = high[p] = 0;
    if (i >= half) continue;
    low[p] = from[i];
    high[p] = from[i + half];
    if (bias != nullptr) {
      low[p] += bias[i];
      high[p] += bias[i + half];
    }
  }
  const float* norm = head < a.heads ? a.q_norm : head < a.heads + a.kv_heads ? a.k_norm : nullptr;
  if (norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) squares += low[p] * low[p] + high[p] * high[p];
    const float scale = rsqrtf(WarpSum(squares) / static_cast<float>(a.head_dim) + a.epsilon);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int i = lane + p * 32;
      if (i >= half) continue;
      low[p] *= scale * norm[i];
      high[p] *= scale * norm[i + half];
    }
  }
  const bool query = head < a.heads;
  const int64_t slot = query ? 0 : a.slots[row];
  if (slot < 0) return;
  // K heads then V heads, as the pages lie in a block.
  const int64_t at = query
                         ? (static_cast<int64_t>(row) * a.heads + head) * a.head_dim
                         : slot + static_cast<int64_t>(head - a.heads) * a.block_size * a.head_dim;
  void* const to = query ? a.q : a.kv;
  const bool fp8 = !query && a.fp8_kv;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + p * 32;
    if (i >= half) continue;
    float first = low[p], second = high[p];
    if (head < a.heads + a.kv_heads) {
      const float c = a.cos[static_cast<int64_t>(row) * half + i];
      const float s = a.sin[static_cast<int64_t>(row) * half + i];
      first = low[p] * c - high[p] * s;
      second = high[p] * c + low[p] * s;
    }
    StoreElement(to, fp8, at + i, first);
    StoreElement(to, fp8, at + i + half, second);
  }
}

__device__ float SiluMul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// kVector: elements a thread takes at once, 4 or 1; divides inner.
template <int kVector>
__global__ __launch_bounds__(kThreads) void SiluMulKernel(const float* gate_up, const float* bias,
                                                          int64_t count, int inner,
                                                          __nv_bfloat16* out) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (at >= count) return;
  const int i = static_cast<int>(at % inner);
  const float* gate = gate_up + at / inner * 2 * inner + i;
  alignas(16) float g[kVector], u[kVector];
  if constexpr (kVector == 4) {
    *reinterpret_cast<float4*>(g) = *reinterpret_cast<const float4*>(gate);
    *reinterpret_cast<float4*>(u) = *reinterpret_cast<const float4*>(gate + inner);
  } else {
    g[0] = gate[0];
    u[0] = gate[inner];
  }
  if (bias != nullptr) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      g[e] += bias[i + e];
      u[e] += bias[inner + i + e];
    }
  }
  if constexpr (kVector == 4) {
    *reinterpret_cast<uint2*>(out + at) =
        make_uint2(PackBFloat16(SiluMul(g[0], u[0]), SiluMul(g[1], u[1])),
                   PackBFloat16(SiluMul(g[2], u[2]), SiluMul(g[3], u[3])));
  } else {
    out[at] = __float2bfloat16_rn(SiluMul(g[0], u[0]));
  }
}

__global__ __launch_bounds__(kThreads) void AddBiasKernel(float* x, const float* bias,
                                                          int64_t count, int width) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) x[at] += bias[at % width];
}

dim3 BlocksFor(int64_t units, int per_block) {
  return dim3(static_cast<unsigned>((units + per_block - 1) / per_block));
}

}  // namespace

cudaError_t BeginStep(const BeginStepArgs& args, const LaunchOptions& options) {
  if (args.rows < 1 || args.items < 1) return cudaErrorInvalidValue;
  return Launch(BeginStepKernel, BlocksFor(args.rows, 1), kThreads, 0, options, args);
}

cudaError_t RmsNormRows(const float* x, const int32_t* row_ids, const float* weight, float epsilon,
                        int rows, int width, __nv_bfloat16* out, const LaunchOptions& options) {
  if (rows < 1) return cudaErrorInvalidValue;
  return Launch(width % 4 == 0 ? RmsNormKernel<4> : RmsNormKernel<1>, BlocksFor(rows, 1), kThreads,
                0, options, x, row_ids, weight, epsilon, width, out);
}

cudaError_t ScaleRows(const float* x, const int32_t* row_ids, const float* weight, int rows,
                      int width, __nv_bfloat16* scaled, float* squares,
                      const LaunchOptions& options) {
  if (rows < 1) return cudaErrorInvalidValue;
  return Launch(width % 4 == 0 ? ScaleRowsKernel<4> : ScaleRowsKernel<1>, BlocksFor(rows, 1),
                kThreads, 0, options, x, row_ids, weight, width, scaled, squares);
}

cudaError_t CopyRows(const void* from, const int32_t* row_ids, int rows, size_t row_bytes, void* to,
                     const LaunchOptions& options) {
  if (rows < 1 || row_bytes % sizeof(uint16_t) != 0) return cudaErrorInvalidValue;
  const auto launch = [&]<typename T>(T) {
    return Launch(CopyRowsKernel<T>, BlocksFor(rows, 1), kThreads, 0, options,
                  static_cast<const T*>(from), row_ids, static_cast<int64_t>(row_bytes / sizeof(T)),
                  static_cast<T*>(to));
  };
  return row_bytes % sizeof(uint4) == 0 ? launch(uint4{}) : launch(uint16_t{});
}

cudaError_t FinishQkv(const FinishQkvArgs& args, const LaunchOptions& options) {
  if (args.rows < 1 || args.head_dim > kMaxHeadDim || args.head_dim % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t units = static_cast<int64_t>(args.rows) * (args.heads + 2 * args.kv_heads);
  return Launch(FinishQkvKernel, BlocksFor(units, kWarps), kThreads, 0, options, args);
}

cudaError_t SiluMulRows(const float* gate_up, const float* bias, int rows, int inner,
                        __nv_bfloat16* out, const LaunchOptions& options) {
  if (rows < 1) return cudaErrorInvalidValue;
  const int64_t count = static_cast<int64_t>(rows) * inner;
  if (inner % 4 == 0) {
    return Launch(SiluMulKernel<4>, BlocksFor(count, kThreads * 4), kThreads, 0, options, gate_up,
                  bias, count, inner, out);
  }
  return Launch(SiluMulKernel<1>, BlocksFor(count, kThreads), kThreads, 0, options, gate_up, bias,
                count, inner, out);
}

cudaError_t AddBiasRows(float* x, const float* bias, int rows, int width,
                        const LaunchOptions& options) {
  if (rows < 1) return cudaErrorInvalidValue;
  const int64_t count = static_cast<int64_t>(rows) * width;
  return Launch(AddBiasKernel, BlocksFor(count, kThreads), kThreads, 0, options, x, bias, count,
                width);
}

}  // namespace tandem::engine::cuda
