// ModelRunner on the CPU: a Qwen2 over a KV pool in memory, and the sampler.
#pragma once

#include <vector>

#include "common/base/kv_layout.h"
#include "engine/model/qwen2.h"
#include "engine/runtime/model_runner.h"
#include "engine/runtime/sampler.h"

namespace tandem {

// Not thread-safe, as every ModelRunner.
//
// float32: bit-identical in every batch. bfloat16: the same where this project's own kernels
// compute the products; see engine/kernels/linear.h for when oneDNN does.
class CpuModelRunner final : public ModelRunner {
 public:
  struct Options {
    int max_num_batched_tokens = 2048;
    int valid_vocab_size = 0;  // token ids below this can be drawn; the rest are padding rows
  };

  // `model`, `threads` and the region's memory outlive the runner.
  CpuModelRunner(Qwen2* model, const KvRegion& kv, const Options& options, Threads* threads);

  // InvalidArgument, with nothing computed, where an item contradicts itself or the pool: these
  // come from requests, so they must not end the process.
  absl::StatusOr<StepOutput> Run(const Batch& batch) override;

 private:
  // A row whose logits are wanted: to draw a token, or to score the prompt token that follows it.
  struct LogitRow {
    int row;  // of the batch
    int item;
    int32_t scored;        // the prompt token to score; -1: draw
    TokenLogprob* result;  // in the output
  };

  absl::Status Check(const Batch& batch) const;
  absl::Status CheckItem(const BatchItem& item, size_t index) const;
  std::vector<LogitRow> PlanLogits(const Batch& batch, StepOutput* output) const;
  // Draws and scores. What goes wrong in a row is its item's status.
  void ComputeLogits(const Batch& batch, const std::vector<LogitRow>& rows, StepOutput* output);

  Qwen2* const model_;
  const KvRegion kv_;
  const Options options_;
  Threads* const threads_;
  ForwardInput input_;                   // kept for its memory
  MemoryBlock logits_;                   // [kLogitRows][vocab]
  std::vector<SamplerScratch> scratch_;  // one per thread
};

}  // namespace tandem
