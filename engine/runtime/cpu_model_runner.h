// ModelRunner on the CPU: a Qwen2 over a KV pool in memory, and the sampler.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "common/base/kv_layout.h"
#include "engine/model/qwen2.h"
#include "engine/runtime/batch_copy.h"
#include "engine/runtime/model_runner.h"
#include "engine/runtime/sampler.h"

namespace tandem::engine {

// Not thread-safe, as every ModelRunner. A step is computed inside Collect, on the caller's and the
// compute threads; its events come true meanwhile.
//
// A sequence's results are bit-identical in every batch, in float32 and in bfloat16.
class CpuModelRunner final : public ModelRunner {
 public:
  struct Options {
    int max_num_batched_tokens = 2048;
    int valid_vocab_size = 0;  // token ids below this can be drawn; the rest are padding rows
    int max_in_flight = 1;
  };

  // `model`, `threads` and the region's memory outlive the runner.
  CpuModelRunner(Qwen2* model, const KvRegion& kv, const Options& options, Threads* threads);

  ~CpuModelRunner() override;

  int max_in_flight() const override { return options_.max_in_flight; }
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override;
  absl::StatusOr<StepOutput> Collect(StepId step) override;

 private:
  struct Step {
    StepId id;
    BatchCopy inputs;
    std::vector<std::shared_ptr<HostEvent>> layer_ready;  // [num_layers] or empty
  };
  // A row whose logits are wanted: to draw a token, or to score the prompt token that follows it.
  struct LogitRow {
    int row;  // of the batch
    int item;
    int32_t scored;        // the prompt token to score; -1: draw
    TokenLogprob* result;  // in the output
  };

  absl::Status Check(const Batch& batch) const;
  absl::Status CheckItem(const BatchItem& item, size_t index) const;
  absl::Status CheckPending(const BatchItem& item, size_t index) const;
  std::vector<LogitRow> PlanLogits(const Batch& batch, StepOutput* output) const;
  // Puts the tokens that the step before drew into `step`. An item whose token could not be drawn
  // takes over its status and computes with token 0.
  void ResolvePending(Step* step, StepOutput* output) const;
  StepOutput Compute(Step* step);
  // Draws and scores. What goes wrong in a row is its item's status.
  void ComputeLogits(const Batch& batch, const std::vector<LogitRow>& rows, StepOutput* output);

  Qwen2* const model_;
  const KvRegion kv_;
  const Options options_;
  Threads* const threads_;
  std::deque<Step> in_flight_;  // oldest first
  StepId last_launched_ = 0;
  std::vector<bool> last_draws_;         // [items] of that step
  std::vector<ItemOutput> last_items_;   // of the step collected last, to take tokens from
  ForwardInput input_;                   // kept for its memory
  MemoryBlock logits_;                   // [kLogitRows][vocab]
  std::vector<SamplerScratch> scratch_;  // one per thread
};

}  // namespace tandem::engine
