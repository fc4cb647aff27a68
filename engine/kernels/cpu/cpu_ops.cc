#include "engine/kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/kernels/cpu/add.h"
#include "engine/kernels/cpu/attention.h"
#include "engine/kernels/cpu/embedding.h"
#include "engine/kernels/cpu/linear.h"
#include "engine/kernels/cpu/rms_norm.h"
#include "engine/kernels/cpu/rope.h"
#include "engine/kernels/cpu/silu_mul.h"

namespace tandem::engine {
namespace {

// Enough rows that reading the weights again for the next tile costs nothing beside the arithmetic.
constexpr size_t kMlpTile = 512;
// Logits below which drawing on one thread is faster.
constexpr size_t kParallelLogits = 20000;
constexpr size_t kAlign = 16;  // floats

size_t RoundUp(size_t floats) { return (floats + kAlign - 1) / kAlign * kAlign; }

}  // namespace

CpuOps::Parts CpuOps::PartsOf(const OpsShape& shape) {
  const size_t tile = std::min(shape.max_rows, kMlpTile);
  const size_t rows = std::max(shape.max_rows, shape.max_logit_rows);
  Parts parts;
  parts.normed = RoundUp(rows * shape.hidden);
  parts.gate_up = RoundUp(tile * 2 * shape.inner);
  parts.cos = parts.sin = RoundUp(shape.max_rows * (shape.head_dim / 2));
  const size_t bytes = std::max({LinearScratchBytes(shape.element, rows, shape.hidden),
                                 LinearScratchBytes(shape.element, shape.max_rows, shape.q_width),
                                 LinearScratchBytes(shape.element, shape.max_rows, shape.inner)});
  parts.linear = RoundUp((bytes + sizeof(float) - 1) / sizeof(float));
  return parts;
}

size_t CpuOps::ScratchBytes(const OpsShape& shape) {
  const Parts p = PartsOf(shape);
  return (p.normed + p.gate_up + p.cos + p.sin + p.linear) * sizeof(float);
}

CpuOps::CpuOps(const OpsShape& shape, Buffer scratch, Threads* threads)
    : shape_(shape),
      threads_(threads),
      scratch_(std::move(scratch)),
      mlp_tile_(std::min(shape.max_rows, kMlpTile)),
      draw_scratch_(static_cast<size_t>(threads->count())) {
  const Parts p = PartsOf(shape);
  normed_ = scratch_.as<float>();
  gate_up_ = normed_ + p.normed;
  cos_ = gate_up_ + p.gate_up;
  sin_ = cos_ + p.cos;
  linear_scratch_ = sin_ + p.sin;
  token_ids_.reserve(shape.max_rows);
  items_.reserve(shape.max_items);
}

size_t CpuOps::PackedWeightBytes(size_t n, size_t k) const {
  return PackedBytes(shape_.element, n, k);
}

void CpuOps::PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                            size_t first_column, void* packed, Stream*) {
  PackRows(source, source_element, rows, k, first_column, shape_.element, packed, threads_);
}

void CpuOps::Project(const Projection& projection, const float* x, size_t rows, float* y) {
  Linear(projection.weight, projection.bias, x, projection.weight.k, rows, y, projection.weight.n,
         linear_scratch_, threads_);
}

void CpuOps::Begin(const BeginArgs& args, Stream*) {
  const RaggedBatch& batch = *args.batch;
  const size_t rows = static_cast<size_t>(batch.num_rows);
  token_ids_.clear();
  for (size_t r = 0; r < rows; ++r) {
    token_ids_.push_back(ResolveId(batch.token_ids[r], args.drawn));
  }
  items_.clear();
  for (int i = 0; i < batch.num_items; ++i) {
    if (batch.starts[i] < 0) continue;
    items_.push_back({static_cast<size_t>(batch.first_rows[i]),
                      batch.first_rows[i + 1] - batch.first_rows[i], batch.starts[i],
                      batch.blocks + batch.first_blocks[i]});
  }
  GatherEmbedding(args.embedding, args.embedding_element, shape_.hidden, token_ids_.data(), rows,
                  args.hidden, threads_);
  RopeTables(args.frequencies, static_cast<int>(shape_.head_dim), args.rope_scale, batch.positions,
             rows, cos_, sin_, threads_);
}

void CpuOps::Qkv(const QkvArgs& args, Stream*) {
  const size_t rows = static_cast<size_t>(args.batch->num_rows);
  const size_t stride = shape_.q_width + 2 * shape_.kv_width;
  const int head_dim = args.pages.head_dim, kv_heads = args.pages.kv_heads;
  float* queries = static_cast<float*>(args.queries);
  float* keys = queries + shape_.q_width;
  RmsNorm(args.hidden, args.norm.weight, args.norm.epsilon, rows, shape_.hidden, normed_, threads_);
  Project(args.projection, normed_, rows, queries);
  if (args.q_norm != nullptr) {
    RmsNormHeads(queries, rows, stride, static_cast<size_t>(args.heads), shape_.head_dim,
                 args.q_norm, args.norm.epsilon, threads_);
  }
  if (args.k_norm != nullptr) {
    RmsNormHeads(keys, rows, stride, static_cast<size_t>(kv_heads), shape_.head_dim, args.k_norm,
                 args.norm.epsilon, threads_);
  }
  // Queries and keys lie side by side: one rotation for both.
  ApplyRope(queries, rows, stride, args.heads + kv_heads, head_dim, cos_, sin_, threads_);
  WriteKv(args.pages, items_.data(), items_.size(), keys, keys + shape_.kv_width, stride, threads_);
}

void CpuOps::Attention(const AttentionArgs& args, Stream*) {
  PagedAttention(args.pages, items_.data(), items_.size(), static_cast<const float*>(args.queries),
                 shape_.q_width + 2 * shape_.kv_width, args.heads, args.scale,
                 static_cast<float*>(args.out), shape_.q_width, threads_);
}

void CpuOps::SelectRows(const SelectRowsArgs& args, Stream*) {
  for (size_t i = 0; i < static_cast<size_t>(args.count); ++i) {
    std::memcpy(static_cast<std::byte*>(args.to) + i * args.row_bytes,
                static_cast<const std::byte*>(args.from) +
                    static_cast<size_t>(args.row_ids[i]) * args.row_bytes,
                args.row_bytes);
  }
}

void CpuOps::AddProjection(const AddProjectionArgs& args, Stream*) {
  const size_t rows = static_cast<size_t>(args.rows);
  Project(args.projection, static_cast<const float*>(args.x), rows, normed_);
  AddInPlace(args.hidden, normed_, rows * shape_.hidden, threads_);
}

void CpuOps::GateUp(const GateUpArgs& args, Stream*) {
  const size_t rows = static_cast<size_t>(args.rows), hidden = shape_.hidden;
  float* out = static_cast<float*>(args.out);
  RmsNorm(args.hidden, args.norm.weight, args.norm.epsilon, rows, hidden, normed_, threads_);
  for (size_t r = 0; r < rows; r += mlp_tile_) {
    const size_t count = std::min(mlp_tile_, rows - r);
    Project(args.projection, normed_ + r * hidden, count, gate_up_);
    SiluMul(gate_up_, count, shape_.inner, out + r * shape_.inner, threads_);
  }
}

void CpuOps::Logits(const LogitsArgs& args, Stream*) {
  const size_t count = static_cast<size_t>(args.count), hidden = shape_.hidden;
  for (size_t i = 0; i < count; ++i) {
    const size_t row = args.row_ids == nullptr ? i : static_cast<size_t>(args.row_ids[i]);
    std::memcpy(normed_ + i * hidden, args.hidden + row * hidden, hidden * sizeof(float));
  }
  RmsNorm(normed_, args.norm.weight, args.norm.epsilon, count, hidden, normed_, threads_);
  Project(args.projection, normed_, count, args.logits);
}

void CpuOps::Sample(const SampleArgs& args, Stream*) {
  const size_t count = static_cast<size_t>(args.count);
  threads_->ForEach(count, count * shape_.vocab > kParallelLogits, [&](size_t i, int member) {
    const DrawSpec& spec = args.specs[i];
    args.results[i] =
        DrawRow(args.logits + i * shape_.vocab, static_cast<size_t>(args.valid_vocab), spec,
                args.token_lists, args.drawn_before, &draw_scratch_[static_cast<size_t>(member)]);
    if (spec.scored < 0 && spec.item >= 0) {
      args.drawn[spec.item] = args.results[i].status == DrawStatus::kOk ? args.results[i].token : 0;
    }
  });
}

}  // namespace tandem::engine
