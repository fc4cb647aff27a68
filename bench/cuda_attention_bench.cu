// The attention of Qwen2.5-7B over paged keys and values on one GPU, over layers that together do
// not fit in L2.
//
//   cuda_attention_bench [--shapes ITEMSxROWS@START,...] [--batch-invariant] [--no-overlap]
//
// ROWS queries after START positions of each of ITEMS sequences. Of one row the decode kernel is
// timed beside the kernel for runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_timing.cuh"
#include "bench/usage.h"
#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/prefill_attention.h"
#include "engine/kernels/cuda/turns.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

constexpr int kHeads = 28, kKvHeads = 4, kDim = 128, kBlockSize = 16, kLayers = 28;

struct Shape {
  int items = 0, rows = 0, start = 0;
};

struct Batch {
  explicit Batch(const Shape& shape, const LaunchOptions& options) : shape(shape) {
    const int length = shape.start + shape.rows;
    const int blocks_each = (length + kBlockSize - 1) / kBlockSize;
    pool_blocks = shape.items * blocks_each;
    std::vector<int32_t> order(static_cast<size_t>(pool_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
    blocks = DeviceArray<int32_t>(order);
    std::vector<int32_t> rows = {0}, block = {0};
    std::vector<DecodeItem> decode;
    const int tiles = (length + kAttentionTile - 1) / kAttentionTile;
    for (int i = 0; i < shape.items; ++i) {
      decode.push_back({i * tiles, length, i * blocks_each, i});
      rows.push_back(rows.back() + shape.rows);
      block.push_back(block.back() + blocks_each);
    }
    decode.push_back({shape.items * tiles, 0, 0, 0});
    first_rows = DeviceArray<int32_t>(rows);
    first_blocks = DeviceArray<int32_t>(block);
    starts =
        DeviceArray<int32_t>(std::vector<int32_t>(static_cast<size_t>(shape.items), shape.start));
    decode_items = DeviceArray<DecodeItem>(decode);
    const size_t width = size_t{kHeads} * kDim * static_cast<size_t>(shape.items * shape.rows);
    q = RandomArray<BFloat16>(width, 1, 2);
    out = DeviceArray<BFloat16>(width);
    page_elements = size_t{2} * kKvHeads * kBlockSize * kDim * static_cast<size_t>(pool_blocks);
    kv = RandomArray<BFloat16>(page_elements * kLayers, 2);
    partial = DeviceArray<float>(PrefillAttentionPartialFloats(kDim, options.multiprocessors));
    parts = DeviceArray<uint64_t>(DecodeAttentionParts(kDim, options.multiprocessors));
    parts.Zero();
    launches = DeviceArray<uint32_t>(static_cast<size_t>(options.multiprocessors));
    launches.Zero();
    turns = DeviceArray<uint32_t>(kTurns);
    turns.Zero();
    flags = DeviceArray<uint32_t>(PrefillAttentionFlags(options.multiprocessors));
    flags.Zero();
  }

  PrefillAttentionArgs Args(int layer, bool batch_invariant) const {
    PrefillAttentionArgs args;
    args.q = q.get();
    args.kv = kv.get() + page_elements * static_cast<size_t>(layer);
    args.first_rows = first_rows.get();
    args.starts = starts.get();
    args.first_blocks = first_blocks.get();
    args.blocks = blocks.get();
    args.out = out.get();
    args.partial = partial.get();
    args.flags = flags.get();
    args.batch_invariant = batch_invariant;
    args.num_items = shape.items;
    args.rows = shape.items * shape.rows;
    args.max_item_rows = shape.rows;
    args.max_length = shape.start + shape.rows;
    args.heads = kHeads;
    args.kv_heads = kKvHeads;
    args.head_dim = kDim;
    args.block_size = kBlockSize;
    args.num_pool_blocks = pool_blocks;
    args.scale = 1 / std::sqrt(static_cast<float>(kDim));
    return args;
  }
  DecodeAttentionArgs DecodeArgs(int layer) const {
    return {q.get(),
            kv.get() + page_elements * static_cast<size_t>(layer),
            decode_items.get(),
            blocks.get(),
            out.get(),
            shape.items,
            kHeads,
            kKvHeads,
            kDim,
            kBlockSize,
            1 / std::sqrt(static_cast<float>(kDim))};
  }

  Shape shape;
  int pool_blocks = 0;
  size_t page_elements = 0;  // of a layer
  DeviceArray<int32_t> blocks, first_rows, first_blocks, starts;
  DeviceArray<DecodeItem> decode_items;
  DeviceArray<BFloat16> q, kv, out;
  DeviceArray<float> partial;
  DeviceArray<uint64_t> parts;
  DeviceArray<uint32_t> launches, turns, flags;
};

void Bench(const Shape& shape, bool batch_invariant, const LaunchOptions& options) {
  const Batch batch(shape, options);
  const auto print = [&](const char* name, double ms) {
    const double us = ms * 1e3 / kLayers;
    const double pairs =
        shape.items * (1.0 * shape.rows * shape.start + 0.5 * shape.rows * (shape.rows + 1.0));
    std::printf("  %4d x %5d rows after %6d, %-16s %9.2f us  %6.1f TFLOP/s  %6.0f GB/s of pages\n",
                shape.items, shape.rows, shape.start, name, us, 4e-6 * kHeads * kDim * pairs / us,
                2e-3 * static_cast<double>(batch.page_elements) / us);
    std::fflush(stdout);
  };
  print(batch_invariant ? "batch-invariant" : "runs", MedianMs(options.stream, 5, [&] {
          for (int i = 0; i < kLayers; ++i) {
            TANDEM_CUDA_CHECK(HopperPrefillAttention(batch.Args(i, batch_invariant), options));
          }
        }));
  if (shape.rows > 1 || batch_invariant) return;
  print("decode", MedianMs(options.stream, 5, [&] {
          for (int i = 0; i < kLayers; ++i) {
            TANDEM_CUDA_CHECK(DecodeAttention(
                batch.DecodeArgs(i), {batch.parts.get(), batch.launches.get(), batch.turns.get()},
                options));
          }
        }));
}

void Main(int argc, char** argv) {
  std::string shapes =
      "8x512@0,1x4096@0,1x8192@24576,1x512@4096,1x16@32768,1x1@2047,16x1@2047,64x1@2047";
  bool batch_invariant = false;
  LaunchOptions options;
  cudaDeviceProp properties;
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  options.multiprocessors = properties.multiProcessorCount;
  options.overlap = true;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--no-overlap") options.overlap = false;
    if (flag == "--batch-invariant") batch_invariant = true;
    if (flag == "--shapes" && i + 1 < argc) shapes = argv[++i];
  }
  TANDEM_CUDA_CHECK(cudaStreamCreate(&options.stream));
  std::printf("%s, %d multiprocessors\n", properties.name, options.multiprocessors);
  for (const char* at = shapes.c_str(); *at != 0;) {
    Shape shape;
    int read = 0;
    if (std::sscanf(at, "%dx%d@%d%n", &shape.items, &shape.rows, &shape.start, &read) != 3) {
      std::fprintf(stderr, "not a shape: %s\n", at);
      std::exit(2);
    }
    Bench(shape, batch_invariant, options);
    at += read + (at[read] == ',' ? 1 : 0);
  }
}

}  // namespace
}  // namespace tandem::engine::cuda

int main(int argc, char** argv) {
  if (tandem::AnswerHelp(argc, argv,
                         "cuda_attention_bench [--shapes ITEMSxROWS@START,...] [--batch-invariant] "
                         "[--no-overlap]")) {
    return 0;
  }
  tandem::engine::cuda::Main(argc, argv);
  return 0;
}
