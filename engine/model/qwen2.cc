#include "engine/model/qwen2.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/base/check.h"
#include "engine/kernels/add.h"
#include "engine/kernels/embedding.h"
#include "engine/kernels/rms_norm.h"
#include "engine/kernels/rope.h"
#include "engine/kernels/silu_mul.h"
#include "engine/model/rope_of.h"

namespace tandem::engine {
namespace {

// Enough rows that reading the weights again for the next tile costs nothing beside the arithmetic.
constexpr size_t kMlpTile = 512;
constexpr size_t kLogitTile = 64;

Element ElementOf(DType dtype) {
  return dtype == DType::kFloat32 ? Element::kFloat32 : Element::kBFloat16;
}

}  // namespace

Qwen2::Qwen2(ModelConfig config, ModelWeights weights, int max_rows, Threads* threads)
    : config_(std::move(config)), weights_(std::move(weights)), threads_(threads) {
  ModelRope rope = RopeOf(config_);
  frequencies_ = std::move(rope.frequencies);
  rope_scale_ = rope.scale;
  const size_t rows = static_cast<size_t>(max_rows);
  const size_t hidden = static_cast<size_t>(config_.hidden_size);
  const size_t head_dim = static_cast<size_t>(config_.head_dim);
  q_width_ = static_cast<size_t>(config_.num_heads) * head_dim;
  kv_width_ = static_cast<size_t>(config_.num_kv_heads) * head_dim;
  mlp_tile_ = std::min(rows, kMlpTile);
  const std::pair<float**, size_t> parts[] = {
      {&hidden_, rows * hidden},
      {&normed_, std::max(rows, kLogitTile) * hidden},
      {&qkv_, rows * (q_width_ + 2 * kv_width_)},
      {&attended_, rows * q_width_},
      {&gate_up_, mlp_tile_ * 2 * static_cast<size_t>(config_.intermediate_size)},
      {&cos_, rows * (head_dim / 2)},
      {&sin_, rows * (head_dim / 2)},
  };
  const Element element = weights_.head.matrix.element;
  linear_scratch_ = MemoryBlock(std::max(
      {LinearScratchBytes(element, std::max(rows, kLogitTile), hidden),
       LinearScratchBytes(element, rows, q_width_),
       LinearScratchBytes(element, mlp_tile_, static_cast<size_t>(config_.intermediate_size))}));
  constexpr size_t kAlign = 16;  // floats
  size_t total = 0;
  for (const auto& [pointer, floats] : parts) total += (floats + kAlign - 1) / kAlign * kAlign;
  workspace_ = MemoryBlock(total * sizeof(float));
  float* at = workspace_.floats();
  for (const auto& [pointer, floats] : parts) {
    *pointer = at;
    at += (floats + kAlign - 1) / kAlign * kAlign;
  }
}

void Qwen2::Linear(const LinearWeights& w, const float* x, size_t x_stride, size_t rows, float* y) {
  engine::Linear(w.matrix, w.bias.empty() ? nullptr : w.bias.data(), x, x_stride, rows, y,
                 w.matrix.n, linear_scratch_.data(), threads_);
}

void Qwen2::Attention(const LayerWeights& layer, const ForwardInput& input, const KvPages& pages,
                      bool output_needed, const std::function<void()>& kv_written) {
  const size_t rows = input.tokens.size(), hidden = static_cast<size_t>(config_.hidden_size);
  const size_t stride = q_width_ + 2 * kv_width_;
  RmsNorm(hidden_, layer.input_norm.data(), config_.rms_norm_eps, rows, hidden, normed_, threads_);
  Linear(layer.qkv, normed_, hidden, rows, qkv_);
  if (config_.qk_norm) {
    const size_t head_dim = static_cast<size_t>(config_.head_dim);
    RmsNormHeads(qkv_, rows, stride, static_cast<size_t>(config_.num_heads), head_dim,
                 layer.q_norm.data(), config_.rms_norm_eps, threads_);
    RmsNormHeads(qkv_ + q_width_, rows, stride, static_cast<size_t>(config_.num_kv_heads), head_dim,
                 layer.k_norm.data(), config_.rms_norm_eps, threads_);
  }
  // Queries and keys lie side by side: one rotation for both.
  ApplyRope(qkv_, rows, stride, config_.num_heads + config_.num_kv_heads, config_.head_dim, cos_,
            sin_, threads_);
  WriteKv(pages, input.items.data(), input.items.size(), qkv_ + q_width_,
          qkv_ + q_width_ + kv_width_, stride, threads_);
  kv_written();
  if (!output_needed) return;
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  PagedAttention(pages, input.items.data(), input.items.size(), qkv_, stride, config_.num_heads,
                 scale, attended_, q_width_, threads_);
  Linear(layer.output, attended_, q_width_, rows, normed_);
  AddInPlace(hidden_, normed_, rows * hidden, threads_);
}

void Qwen2::FeedForward(const LayerWeights& layer, size_t rows) {
  const size_t hidden = static_cast<size_t>(config_.hidden_size);
  const size_t inner = static_cast<size_t>(config_.intermediate_size);
  RmsNorm(hidden_, layer.post_attention_norm.data(), config_.rms_norm_eps, rows, hidden, normed_,
          threads_);
  for (size_t r = 0; r < rows; r += mlp_tile_) {
    const size_t count = std::min(mlp_tile_, rows - r);
    Linear(layer.gate_up, normed_ + r * hidden, hidden, count, gate_up_);
    SiluMul(gate_up_, count, inner, threads_);
    Linear(layer.down, gate_up_, 2 * inner, count, normed_ + r * hidden);
  }
  AddInPlace(hidden_, normed_, rows * hidden, threads_);
}

void Qwen2::Forward(const ForwardInput& input, const KvRegion& kv,
                    const std::function<void(int)>& on_layer_done) {
  const size_t rows = input.tokens.size();
  if (rows == 0) return;
  GatherEmbedding(weights_.embedding.data, weights_.embedding.element,
                  static_cast<size_t>(config_.hidden_size), input.tokens.data(), rows, hidden_,
                  threads_);
  RopeTables(frequencies_.data(), config_.head_dim, rope_scale_, input.positions.data(), rows, cos_,
             sin_, threads_);
  for (int i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
    const KvPages pages{kv.Block(i, 0), ElementOf(kv.layout.dtype), kv.layout.num_kv_heads,
                        kv.layout.head_dim, kv.layout.block_size};
    // Nothing reads the last layer's output if nobody wants logits.
    const bool output_needed = input.need_hidden || i + 1 < config_.num_layers;
    Attention(layer, input, pages, output_needed, [&] {
      if (on_layer_done) on_layer_done(i);
    });
    if (output_needed) FeedForward(layer, rows);
  }
}

void Qwen2::Logits(std::span<const int> rows, float* out) {
  const size_t hidden = static_cast<size_t>(config_.hidden_size);
  const size_t vocab = static_cast<size_t>(config_.vocab_size);
  for (size_t first = 0; first < rows.size(); first += kLogitTile) {
    const size_t count = std::min(kLogitTile, rows.size() - first);
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(normed_ + i * hidden, hidden_ + static_cast<size_t>(rows[first + i]) * hidden,
                  hidden * sizeof(float));
    }
    RmsNorm(normed_, weights_.final_norm.data(), config_.rms_norm_eps, count, hidden, normed_,
            threads_);
    Linear(weights_.head, normed_, hidden, count, out + first * vocab);
  }
}

}  // namespace tandem::engine
