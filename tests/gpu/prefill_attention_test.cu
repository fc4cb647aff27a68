// The prefill attention kernels against a plain one in float64: one thread block per row and head,
// the formula of the header read literally, on the same bfloat16 inputs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/flash_prefill_attention.h"
#include "engine/kernels/cuda/prefill_attention.h"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/wide_pages.h"
#include "engine/kernels/element.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

int failures = 0;
int multiprocessors = 0;

struct Item {
  int start = 0, rows = 1;
  int sequence = 0;  // decides the data, by position
};

struct Shape {
  int heads = 28, kv_heads = 4, head_dim = 128, block_size = 16;
  bool fp8_kv = false;
};

struct Case {
  std::string name;
  Shape shape;
  std::vector<Item> items;
  bool skip_single_rows = false;
  bool split = false;
  int layout = 0;  // seed of the order of blocks
  bool batch_invariant = false;
};

__device__ float QueryAt(const Shape& s, int sequence, int position, int head, int d) {
  return 4 * RandomAt(1 + sequence, (static_cast<uint64_t>(position) * s.heads + head) * 256 + d);
}
__device__ float PageAt(const Shape& s, int sequence, int position, int kv_head, int value, int d) {
  return RandomAt(101 + sequence,
                  ((static_cast<uint64_t>(position) * s.kv_heads + kv_head) * 2 + value) * 256 + d);
}

// One block of threads per (row, head).
__global__ void FillQueries(Shape s, int first_row, Item item, BFloat16* q) {
  const int row = blockIdx.x, head = blockIdx.y, d = threadIdx.x;
  q[(static_cast<int64_t>(first_row + row) * s.heads + head) * s.head_dim + d] =
      __float2bfloat16(QueryAt(s, item.sequence, item.start + row, head, d));
}

// One block of threads per (position, KV head).
__global__ void FillPages(Shape s, const int32_t* blocks, Item item, void* kv) {
  const int position = blockIdx.x, kv_head = blockIdx.y, d = threadIdx.x;
  const int64_t block = blocks[position / s.block_size];
  for (int value = 0; value < 2; ++value) {
    const int64_t row =
        ((block * 2 + value) * s.kv_heads + kv_head) * s.block_size + position % s.block_size;
    StoreElement(kv, s.fp8_kv, row * s.head_dim + d,
                 PageAt(s, item.sequence, position, kv_head, value, d));
  }
}

constexpr int kReferenceThreads = 128;

// Of one item; one block of threads per (row, head).
__global__ void Reference(Shape s, const BFloat16* q, const void* kv, const int32_t* blocks,
                          int first_row, int start, double scale, float* out) {
  extern __shared__ double scores[];
  __shared__ double shared_sum[kReferenceThreads];
  const int row = first_row + blockIdx.x, head = blockIdx.y;
  const int kv_head = head / (s.heads / s.kv_heads), positions = start + blockIdx.x + 1;
  const BFloat16* query = q + (static_cast<int64_t>(row) * s.heads + head) * s.head_dim;
  const auto element = [&](int position, int value, int d) {
    const int64_t block = blocks[position / s.block_size];
    const int64_t at =
        (((block * 2 + value) * s.kv_heads + kv_head) * s.block_size + position % s.block_size) *
            s.head_dim +
        d;
    return static_cast<double>(s.fp8_kv ? ToFloat(static_cast<const E4M3*>(kv)[at])
                                        : ToFloat(static_cast<const BFloat16*>(kv)[at]));
  };
  for (int p = threadIdx.x / 32; p < positions; p += kReferenceThreads / 32) {
    double dot = 0;
    for (int d = threadIdx.x % 32; d < s.head_dim; d += 32) {
      dot += static_cast<double>(__bfloat162float(query[d])) * element(p, 0, d);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
    if (threadIdx.x % 32 == 0) scores[p] = dot * scale;
  }
  __syncthreads();
  double most = -INFINITY, sum = 0;
  for (int p = 0; p < positions; ++p) most = fmax(most, scores[p]);
  __syncthreads();
  for (int p = threadIdx.x; p < positions; p += kReferenceThreads) {
    scores[p] = exp(scores[p] - most);
    sum += scores[p];
  }
  shared_sum[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (const double part : shared_sum) sum += part;
  if (threadIdx.x < s.head_dim) {
    double value = 0;
    for (int p = 0; p < positions; ++p) {
      value += scores[p] * element(p, 1, static_cast<int>(threadIdx.x));
    }
    out[(static_cast<int64_t>(row) * s.heads + head) * s.head_dim + threadIdx.x] =
        static_cast<float>(value / sum);
  }
}

// A case's batch on the device.
struct Batch {
  explicit Batch(const Case& c) : shape(c.shape) {
    std::vector<int32_t> first_rows = {0}, starts, first_blocks = {0};
    int total_blocks = 0;
    for (const Item& item : c.items) {
      first_rows.push_back(first_rows.back() + item.rows);
      starts.push_back(item.start);
      const int positions = std::max(0, item.start + item.rows);
      max_item_rows = std::max(max_item_rows, item.rows);
      max_length = std::max(max_length, positions);
      // Some lists go on behind the sequence's end.
      const int count = (positions + shape.block_size - 1) / shape.block_size +
                        (item.start >= 0 ? item.sequence % 2 : 0);
      total_blocks += count;
      first_blocks.push_back(total_blocks);
    }
    rows = first_rows.back();
    pool_blocks = total_blocks + 3;
    std::vector<int32_t> order(static_cast<size_t>(pool_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(c.layout) + 7));
    order.resize(static_cast<size_t>(std::max(total_blocks, 1)));
    host_first_rows = first_rows;
    host_first_blocks = first_blocks;
    this->first_rows = DeviceArray<int32_t>(first_rows);
    this->starts = DeviceArray<int32_t>(starts);
    this->first_blocks = DeviceArray<int32_t>(first_blocks);
    blocks = DeviceArray<int32_t>(order);
    const size_t width = static_cast<size_t>(shape.heads) * shape.head_dim;
    q = DeviceArray<BFloat16>(rows * width);
    out = DeviceArray<BFloat16>(rows * width);
    kv = DeviceArray<uint8_t>(static_cast<size_t>(pool_blocks) * 2 * shape.kv_heads *
                              shape.block_size * shape.head_dim * (shape.fp8_kv ? 1 : 2));
    partial = DeviceArray<float>(PrefillAttentionPartialFloats(shape.head_dim, multiprocessors));
    q.Poison();
    out.Poison();
    kv.Poison();
    partial.Poison();
    flags = DeviceArray<uint32_t>(PrefillAttentionFlags(multiprocessors));
    flags.Zero();
    for (size_t i = 0; i < c.items.size(); ++i) {
      const Item& item = c.items[i];
      if (item.start < 0) continue;
      FillQueries<<<dim3(item.rows, shape.heads), shape.head_dim>>>(shape, first_rows[i], item,
                                                                    q.get());
      FillPages<<<dim3(item.start + item.rows, shape.kv_heads), shape.head_dim>>>(
          shape, blocks.get() + first_blocks[i], item, kv.get());
    }
    TANDEM_CUDA_CHECK(cudaGetLastError());
  }

  PrefillAttentionArgs Args(const Case& c) const {
    PrefillAttentionArgs args;
    args.q = q.get();
    args.kv = kv.get();
    args.first_rows = first_rows.get();
    args.starts = starts.get();
    args.first_blocks = first_blocks.get();
    args.blocks = blocks.get();
    args.out = out.get();
    args.partial = c.split || c.batch_invariant ? partial.get() : nullptr;
    args.flags = c.split ? flags.get() : nullptr;
    args.batch_invariant = c.batch_invariant;
    args.num_items = static_cast<int>(c.items.size());
    args.rows = rows;
    args.max_item_rows = max_item_rows;
    args.max_length = max_length;
    args.heads = shape.heads;
    args.kv_heads = shape.kv_heads;
    args.head_dim = shape.head_dim;
    args.block_size = shape.block_size;
    args.num_pool_blocks = pool_blocks;
    args.skip_single_rows = c.skip_single_rows;
    args.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
    args.fp8_kv = shape.fp8_kv;
    return args;
  }

  Shape shape;
  int rows = 0, pool_blocks = 0, max_item_rows = 0, max_length = 0;
  std::vector<int32_t> host_first_rows, host_first_blocks;
  DeviceArray<int32_t> first_rows, starts, first_blocks, blocks;
  DeviceArray<BFloat16> q, out;
  DeviceArray<uint8_t> kv;
  DeviceArray<float> partial;
  DeviceArray<uint32_t> flags;
};

using Kernel = cudaError_t (*)(const PrefillAttentionArgs&, const LaunchOptions&);

LaunchOptions Options(bool overlap = false) {
  LaunchOptions options;
  options.multiprocessors = multiprocessors;
  options.overlap = overlap;
  return options;
}

std::vector<BFloat16> Run(Kernel kernel, const Case& c, const Batch& batch) {
  TANDEM_CUDA_CHECK(kernel(batch.Args(c), Options()));
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  return batch.out.ToHost();
}

// Rounding of probabilities and of the result costs about 2e-3.
constexpr double kLimit = 4e-3, kRowLimit = 1.2e-2;

void Test(Kernel kernel, const Case& c) {
  const Batch batch(c);
  const Shape& s = c.shape;
  const size_t width = static_cast<size_t>(s.heads) * s.head_dim;
  DeviceArray<float> reference(static_cast<size_t>(batch.rows) * width);
  reference.Poison();
  const int shared_bytes = batch.max_length * static_cast<int>(sizeof(double));
  TANDEM_CUDA_CHECK(cudaFuncSetAttribute(Reference, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         std::max(shared_bytes, 1024)));
  const PrefillAttentionArgs args = batch.Args(c);
  for (size_t i = 0; i < c.items.size(); ++i) {
    const Item& item = c.items[i];
    if (item.start < 0 || (c.skip_single_rows && item.rows == 1)) continue;
    Reference<<<dim3(item.rows, s.heads), kReferenceThreads, shared_bytes>>>(
        s, batch.q.get(), batch.kv.get(), batch.blocks.get() + batch.host_first_blocks[i],
        batch.host_first_rows[i], item.start, static_cast<double>(args.scale), reference.get());
    TANDEM_CUDA_CHECK(cudaGetLastError());
  }
  const std::vector<float> wanted = reference.ToHost();
  const std::vector<BFloat16> got = Run(kernel, c, batch);
  int flags_left = 0;
  for (const uint32_t flag : batch.flags.ToHost()) flags_left += flag != 0 ? 1 : 0;

  double difference = 0, norm = 0, worst = 0;
  int bad = 0, shown = 0, touched = 0;
  for (size_t i = 0; i < c.items.size(); ++i) {
    const Item& item = c.items[i];
    const bool skipped = item.start < 0 || (c.skip_single_rows && item.rows == 1);
    for (int row = 0; row < item.rows; ++row) {
      for (int head = 0; head < s.heads; ++head) {
        const size_t at =
            static_cast<size_t>(batch.host_first_rows[i] + row) * width + head * s.head_dim;
        if (skipped) {
          for (int d = 0; d < s.head_dim; ++d) {
            uint16_t bits;
            std::memcpy(&bits, &got[at + d], 2);
            touched += bits != 0xffff ? 1 : 0;
          }
          continue;
        }
        double row_difference = 0, row_norm = 0;
        for (int d = 0; d < s.head_dim; ++d) {
          const double w = wanted[at + d], g = __bfloat162float(got[at + d]);
          row_difference += (g - w) * (g - w);
          row_norm += w * w;
        }
        difference += row_difference;
        norm += row_norm;
        const double error = std::sqrt(row_difference / row_norm);
        worst = std::isnan(error) ? error : std::max(worst, error);
        if (!(error <= kRowLimit)) {
          ++bad;
          if (shown++ < 4) {
            std::printf("    item %zu row %d (position %d) head %d: error %.3g;", i, row,
                        item.start + row, head, error);
            for (const int d : {0, 1, 8, 63, s.head_dim - 1}) {
              std::printf(" [%d] %.4f/%.4f", d, __bfloat162float(got[at + d]), wanted[at + d]);
            }
            std::printf("\n");
          }
        }
      }
    }
  }
  const double error = norm == 0 ? 0 : std::sqrt(difference / norm);
  const bool passed = error <= kLimit && bad == 0 && touched == 0 && flags_left == 0;
  if (!passed) ++failures;
  std::printf("%s %s: error %.2e, worst row %.2e, bad rows %d, touched %d, flags left %d\n",
              passed ? "passed" : "FAILED", (c.name + (s.fp8_kv ? ", e4m3" : "")).c_str(), error,
              worst, bad, touched, flags_left);
  std::fflush(stdout);
}

// The same sequence in one piece, in chunks, row by row, and in company: the same bits.
void TestInvariance(Kernel kernel, const Shape& shape, bool batch_invariant, int rows) {
  const auto run = [&](std::vector<Item> items, int layout) {
    Case c{"", shape, std::move(items)};
    c.layout = layout;
    c.batch_invariant = batch_invariant;
    const Batch batch(c);
    return Run(kernel, c, batch);
  };
  const size_t width = static_cast<size_t>(shape.heads) * shape.head_dim;
  const std::vector<BFloat16> whole = run({{0, rows, 1}}, 1);
  int compared = 0;
  std::string which;  // chunks that differ
  const auto compare = [&](const std::vector<BFloat16>& part, size_t first, int start, int count) {
    int different = 0;
    for (int row = 0; row < count; ++row) {
      different += std::memcmp(&part[(first + static_cast<size_t>(row)) * width],
                               &whole[static_cast<size_t>(start + row) * width], width * 2) != 0
                       ? 1
                       : 0;
    }
    compared += count;
    if (different != 0) {
      which.append(" ").append(std::to_string(different)).append(" of ");
      which.append(std::to_string(count)).append(" at ").append(std::to_string(start));
    }
  };
  int cut = 0;
  for (const int length : {1, 130, 47, 512, 310, rows - 1000}) {
    if (length == 0) continue;
    compare(run({{77, 9, 2}, {cut, length, 1}, {500, 300, 3}}, 2 + length), 9, cut, length);
    cut += length;
  }
  // Chunks short enough for other tiles, alone and among others.
  compare(run({{rows - 5, 5, 1}}, 9), 0, rows - 5, 5);
  compare(run({{rows - 20, 20, 1}, {3, 2, 2}}, 10), 0, rows - 20, 20);
  // As sequences decode: alone, and so many that none is cut for the sake of balance.
  for (const int start : {0, 127, 999, rows / 2, rows - 1}) {
    if (start >= rows) continue;
    compare(run({{start, 1, 1}}, 11), 0, start, 1);
    std::vector<Item> many = {{start, 1, 1}, {2 * rows, 1, 2}};
    for (int i = 0; i < 150; ++i) many.push_back({rows - i, 1, 3});
    compare(run(many, 12), 0, start, 1);
  }
  if (!which.empty() || cut != rows) ++failures;
  std::printf("%s batch invariance%s, head_dim %d, %d rows: of %d compared differ:%s\n",
              which.empty() ? "passed" : "FAILED", batch_invariant ? " promised" : "",
              shape.head_dim, rows, compared, which.empty() ? " none" : which.c_str());
  std::fflush(stdout);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const Shape big, small{14, 2, 64, 16};
  for (const int length : {1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 130, 176, 177, 257, 1000}) {
    cases.push_back({"length " + std::to_string(length), big, {{0, length, length}}});
  }
  cases.push_back({"length 4097", big, {{0, 4097, 3}}});
  for (const int length : {1, 17, 128, 130, 1000}) {
    cases.push_back({"head_dim 64 length " + std::to_string(length), small, {{0, length, length}}});
  }
  for (const int block_size : {32, 48, 64, 256}) {
    Shape shape = big;
    shape.block_size = block_size;
    cases.push_back({"block size " + std::to_string(block_size),
                     shape,
                     {{0, 300, 1}, {129, 200, 2}, {1000, 33, 3}}});
  }
  for (const int group : {1, 2, 4, 8}) {
    for (const int head_dim : {64, 128}) {
      cases.push_back({"group " + std::to_string(group) + " head_dim " + std::to_string(head_dim),
                       {3 * group, 3, head_dim, 16},
                       {{0, 200, 1}, {37, 150, 2}}});
    }
  }
  for (const int start : {1, 16, 100, 127, 128, 129, 160, 2000, 4096}) {
    cases.push_back({"chunk at " + std::to_string(start), big, {{start, 200, start}}});
  }
  cases.push_back({"second turn", big, {{4096, 512, 1}}});
  std::vector<Item> many;
  for (int i = 0; i < 40; ++i) many.push_back({i * 37 % 300, 1 + i * 53 % 190, i});
  cases.push_back({"many items", big, many});
  std::vector<Item> mixed = {{-1, 1, 0},   {9, 1, 1},  {0, 260, 2},
                             {1000, 1, 3}, {50, 2, 4}, {-1, 1, 0}};
  cases.push_back({"mixed", big, mixed});
  cases.push_back({"mixed, single rows skipped", big, mixed, true});
  cases.push_back({"only single rows, skipped", big, {{3, 1, 1}, {5, 1, 2}}, true});
  std::vector<Item> eight;
  for (int i = 0; i < 8; ++i) eight.push_back({0, 512, i});
  cases.push_back({"8 x 512", big, eight});
  for (const int rows : {1, 16, 100, 128, 130, 250}) {
    cases.push_back({"split: " + std::to_string(rows) + " rows over 4000",
                     big,
                     {{4000, rows, rows}},
                     false,
                     true});
  }
  // Few rows: heads that share a KV head share a unit of work.
  for (const int group : {1, 2, 7, 8}) {
    for (const int head_dim : {64, 128}) {
      for (const int rows : {2, 19, 70}) {
        const Shape shape{2 * group, 2, head_dim, 32};
        cases.push_back({"few rows: " + std::to_string(rows) + ", group " + std::to_string(group) +
                             ", head_dim " + std::to_string(head_dim),
                         shape,
                         {{700, rows, 1}, {0, rows - 1, 2}, {33, rows, 4}},
                         false,
                         rows == 19});
      }
    }
  }
  // Units dealt by tiles.
  cases.push_back({"split: second turn", big, {{4096, 512, 1}}, false, true});
  cases.push_back({"split: second turn off a tile", big, {{4001, 500, 1}}, false, true});
  cases.push_back({"split: chunk", big, {{3000, 1000, 1}}, false, true});
  cases.push_back({"split: two chunks", big, {{2500, 300, 1}, {100, 290, 2}}, false, true});
  // Cut at fixed positions.
  for (const int start : {0, 1800, 1990, 2047, 2048, 6000}) {
    for (const int rows : {1, 5, 100, 300}) {
      cases.push_back(
          {"batch-invariant: " + std::to_string(rows) + " rows after " + std::to_string(start),
           big,
           {{start, rows, start + 1}},
           false,
           false,
           0,
           true});
    }
  }
  cases.push_back({"batch-invariant: 6000 rows", big, {{0, 6000, 3}}, false, false, 0, true});
  cases.push_back({"batch-invariant: head_dim 64",
                   small,
                   {{2040, 20, 1}, {5000, 1, 2}},
                   false,
                   false,
                   0,
                   true});
  cases.push_back({"batch-invariant: many items", big, many, false, false, 0, true});
  cases.push_back({"batch-invariant: mixed", big, mixed, false, false, 0, true});
  std::vector<Item> decoding;
  for (int i = 0; i < 16; ++i) decoding.push_back({i * 411, 1, i});
  cases.push_back({"batch-invariant: decoding", big, decoding, false, false, 0, true});
  cases.push_back({"split: short", big, {{0, 100, 1}, {300, 20, 2}}, false, true});
  cases.push_back({"split: uneven", small, {{10, 100, 1}, {5000, 20, 2}}, false, true});
  cases.push_back({"split: not needed", big, {{0, 700, 1}}, false, true});
  cases.push_back({"split: mixed", big, mixed, true, true});
  return cases;
}

// Writes queries and pages late, having let its successor start.
__global__ void CopyLate(const BFloat16* q, size_t q_count, BFloat16* to_q, const uint8_t* kv,
                         size_t kv_count, uint8_t* to_kv) {
  WaitForPredecessor();
  LetSuccessorStart();
  const long long start = clock64();
  while (clock64() - start < 200000) __nanosleep(1000);
  const size_t first = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = first; i < q_count; i += stride) to_q[i] = q[i];
  for (size_t i = first; i < kv_count; i += stride) to_kv[i] = kv[i];
}

// The kernel waits for its predecessor before it reads what that writes.
void TestOverlap(Kernel kernel, bool split, bool fp8_kv) {
  Case c{"", {}, {{700, 60, 1}, {0, 50, 2}}, false, split};
  c.shape.fp8_kv = fp8_kv;
  const Batch batch(c);
  const std::vector<BFloat16> wanted = Run(kernel, c, batch);
  DeviceArray<BFloat16> late_q(batch.q.size());
  DeviceArray<uint8_t> late_kv(batch.kv.size());
  int different = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    late_q.Poison();
    late_kv.Poison();
    TANDEM_CUDA_CHECK(Launch(CopyLate, dim3(32), 128, 0, Options(true), batch.q.get(),
                             batch.q.size(), late_q.get(), batch.kv.get(), batch.kv.size(),
                             late_kv.get()));
    PrefillAttentionArgs args = batch.Args(c);
    args.q = late_q.get();
    args.kv = late_kv.get();
    TANDEM_CUDA_CHECK(kernel(args, Options(true)));
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<BFloat16> got = batch.out.ToHost();
    different += std::memcmp(got.data(), wanted.data(), got.size() * sizeof(BFloat16)) != 0 ? 1 : 0;
  }
  if (different != 0) ++failures;
  std::printf("%s overlap%s%s: %d of 3 runs differ\n", different == 0 ? "passed" : "FAILED",
              split ? ", split" : "", fp8_kv ? ", e4m3" : "", different);
}

// Every number of the runs' pages, and no others' place.
void TestWidePages() {
  Case c{"", {14, 2, 64, 32}, {{-1, 1, 0}, {9, 1, 1}, {0, 260, 2}, {1000, 1, 3}, {31, 2, 4}}};
  c.shape.fp8_kv = true;
  const Batch batch(c);
  const int num_items = static_cast<int>(c.items.size());
  const size_t elements = size_t{2} * 2 * 32 * 64;  // of a block
  DeviceArray<int32_t> first_wide(c.items.size() + 1);
  TANDEM_CUDA_CHECK(NumberWideBlocks({batch.first_rows.get(), batch.starts.get(), num_items, 32},
                                     first_wide.get(), Options()));
  const std::vector<int32_t> numbers = first_wide.ToHost();
  bool right = numbers == std::vector<int32_t>{0, 0, 0, 9, 9, 11};
  DeviceArray<BFloat16> wide(11 * elements);
  wide.Poison();
  WidenPagesArgs args;
  args.kv = batch.kv.get();
  args.first_blocks = batch.first_blocks.get();
  args.blocks = batch.blocks.get();
  args.first_wide_blocks = first_wide.get();
  args.wide = wide.get();
  args.num_items = num_items;
  args.num_wide_blocks = 11;
  args.block_elements = static_cast<int>(elements);
  TANDEM_CUDA_CHECK(WidenPages(args, Options()));
  const std::vector<BFloat16> got = wide.ToHost();
  const std::vector<uint8_t> codes = batch.kv.ToHost();
  const std::vector<int32_t> blocks = batch.blocks.ToHost();
  int different = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const size_t block = i / elements, item = block < 9 ? 2 : 4;
    const size_t in_item = block < 9 ? block : block - 9;
    const auto from =
        static_cast<size_t>(blocks[static_cast<size_t>(batch.host_first_blocks[item]) + in_item]);
    const float wanted = E4M3ToFloat(codes[from * elements + i % elements]);
    const float number = __bfloat162float(got[i]);
    different += std::isnan(wanted) ? !std::isnan(number) : number != wanted;
  }
  right = right && different == 0;
  if (!right) ++failures;
  std::printf("%s wide pages: %d numbers differ\n", right ? "passed" : "FAILED", different);
}

// As on devices with less shared memory.
cudaError_t FlashInSmallSteps(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  return FlashPrefillAttention(args, options, 32);
}

void TestAll(const char* name, Kernel kernel, const std::vector<int>& head_dims,
             const char* pattern, bool fp8_kv = false) {
  std::printf("%s\n", name);
  for (Case c : Cases()) {
    c.shape.fp8_kv = fp8_kv;
    if (std::count(head_dims.begin(), head_dims.end(), c.shape.head_dim) == 0) continue;
    if (pattern == nullptr || c.name.find(pattern) != std::string::npos) Test(kernel, c);
  }
  if (pattern != nullptr) return;
  for (const int head_dim : head_dims) {
    Shape shape = head_dim == 128 ? Shape{} : Shape{14, 2, head_dim, 32};
    shape.fp8_kv = fp8_kv;
    TestInvariance(kernel, shape, false, 1000);
    TestInvariance(kernel, shape, true, 1000);
    TestInvariance(kernel, shape, true, 5000);
  }
  TestOverlap(kernel, false, fp8_kv);
  TestOverlap(kernel, true, fp8_kv);
}

int Main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  cudaDeviceProp properties;
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  multiprocessors = properties.multiProcessorCount;
  const char* pattern = argc < 2 ? nullptr : argv[1];
  TestAll("FlashPrefillAttention", FlashPrefillAttention, {64, 128}, pattern);
  TestAll("FlashPrefillAttention in small steps", FlashInSmallSteps, {128}, pattern);
  TestAll("FlashPrefillAttention of e4m3", FlashPrefillAttention, {64, 128}, pattern, true);
  TestAll("FlashPrefillAttention of e4m3 in small steps", FlashInSmallSteps, {128}, pattern, true);
  TestWidePages();
  if (properties.major == 9) {
    TestAll("HopperPrefillAttention", HopperPrefillAttention, {64, 128}, pattern);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace tandem::engine::cuda

int main(int argc, char** argv) { return tandem::engine::cuda::Main(argc, argv); }
