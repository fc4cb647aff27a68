// The forward pass of a decoder (ModelConfig) over a ragged batch and paged KV.
//
// Not thread-safe: one loop owns it. Residual stream, norms, softmax and logits are float32 in both
// modes; bfloat16 rounds weights, the inputs of matrix products, and KV.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "common/base/kv_layout.h"
#include "common/base/model_config.h"
#include "engine/kernels/attention.h"
#include "engine/kernels/threads.h"
#include "engine/model/mapped_file.h"
#include "engine/model/model_weights.h"

namespace tandem::engine {

// Rows are tokens; the rows of an item are consecutive positions of one sequence.
struct ForwardInput {
  std::vector<int32_t> tokens;     // [rows]
  std::vector<int32_t> positions;  // [rows]
  std::vector<AttentionItem> items;
  bool need_hidden = true;  // false: nobody will ask for logits, only KV is wanted
};

class Qwen2 {
 public:
  // `max_rows`: the largest batch; the workspace is allocated here, once. `threads` outlives this.
  Qwen2(ModelConfig config, ModelWeights weights, int max_rows, Threads* threads);

  // Computes all rows and writes their KV into `kv`. `on_layer_done(layer)`, where set, is called
  // as soon as a layer's KV of the whole batch is written.
  void Forward(const ForwardInput& input, const KvRegion& kv,
               const std::function<void(int)>& on_layer_done);

  // Logits of some rows of the last Forward (which had need_hidden): out is [rows.size()][vocab].
  void Logits(std::span<const int> rows, float* out);

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }

 private:
  void Linear(const LinearWeights& w, const float* x, size_t x_stride, size_t rows, float* y);
  void Attention(const LayerWeights& layer, const ForwardInput& input, const KvPages& pages,
                 bool output_needed, const std::function<void()>& kv_written);
  void FeedForward(const LayerWeights& layer, size_t rows);

  const ModelConfig config_;
  const ModelWeights weights_;
  Threads* threads_;
  std::vector<float> frequencies_;  // [head_dim / 2]
  float rope_scale_ = 1;
  size_t q_width_ = 0;   // heads * head_dim
  size_t kv_width_ = 0;  // kv_heads * head_dim
  size_t mlp_tile_ = 0;  // rows of the feed-forward block computed together
  MemoryBlock linear_scratch_;
  MemoryBlock workspace_;      // holds what the pointers below point to
  float* hidden_ = nullptr;    // [max_rows][hidden]: the residual stream
  float* normed_ = nullptr;    // [max_rows][hidden]
  float* qkv_ = nullptr;       // [max_rows][q_width + 2 * kv_width]
  float* attended_ = nullptr;  // [max_rows][q_width]
  float* gate_up_ = nullptr;   // [mlp_tile][2 * intermediate]
  float* cos_ = nullptr;       // [max_rows][head_dim / 2]
  float* sin_ = nullptr;       // [max_rows][head_dim / 2]
};

}  // namespace tandem::engine
