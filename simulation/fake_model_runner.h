// A model without weights whose every token depends on the whole KV history, so that lost, wrong,
// stale or mixed-up KV changes the tokens.
//
// Each computed position writes one 8-byte row per layer into its pool block:
//   row(layer, p) = Mix(row(layer, p - 1), layer, p, token[p])      (read back from the pool)
// and the next token is a hash of all rows of all layers, again read from the pool. Like a real
// model, a position's KV depends on all tokens before it. Greedy draws use that hash alone; with
// temperature > 0 it is mixed with (seed, position of the drawn token), as the counter-based
// sampler does. Penalties, top-k and the like are ignored; ends (eos unless ignore_eos, stop
// tokens) are masked before min_tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "common/base/kv_layout.h"
#include "engine/runtime/model_runner.h"
#include "simulation/batch_copy.h"

namespace tandem::engine {

// Owns the memory of a pool, filled with garbage at first, which other processes can map.
class FakeKvMemory {
 public:
  explicit FakeKvMemory(int num_blocks, int block_size = 16, int num_layers = 2);
  ~FakeKvMemory();
  FakeKvMemory(const FakeKvMemory&) = delete;
  FakeKvMemory& operator=(const FakeKvMemory&) = delete;
  const KvRegion& region() const { return region_; }

 private:
  KvRegion region_;
};

// Hashes of whole blocks of `region`, as KvSender::Digest() gives.
std::vector<uint64_t> FakeBlockDigests(const KvRegion& region, std::span<const int32_t> blocks);

struct FakeModelOptions {
  int vocab_size = 1000;
  int max_num_batched_tokens = 1 << 30;
  // Called on the running thread before a batch is computed: may block (a gate), look, or fail the
  // step.
  std::function<absl::Status(const Batch&)> before_run;
  // The status of an item that draws a token; empty: all are OK.
  std::function<absl::Status(const BatchItem&)> item_status;
  int max_in_flight = 1;
  // Whether the numbers of this item come out broken, as NaN would: so does what is computed on top
  // of them, and a draw behind them fails with INTERNAL. Empty: never.
  std::function<bool(const BatchItem&)> breaks;
};

// Not thread-safe, as every ModelRunner. Computes inside Collect.
class FakeModelRunner : public ModelRunner {
 public:
  // A row needs 8 bytes: head_dim * element size >= 8. `region` outlives the runner.
  FakeModelRunner(const KvRegion& region, FakeModelOptions options);

  ~FakeModelRunner() override;

  // INVALID_ARGUMENT for a malformed batch: over max_num_batched_tokens, block table too short,
  // block out of range, the same block written by two items, token out of range, a
  // pending token that the step before does not draw.
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override;
  absl::StatusOr<StepOutput> Collect(StepId step) override;
  int max_in_flight() const override { return options_.max_in_flight; }

  int num_launched() const { return static_cast<int>(last_launched_); }
  int num_runs() const { return num_runs_; }
  int64_t num_tokens() const { return num_tokens_; }  // computed over all runs

 private:
  struct Step {
    StepId id;
    BatchCopy inputs;
    std::vector<std::shared_ptr<HostEvent>> layer_ready;
  };

  absl::StatusOr<StepOutput> Compute(Step* step);
  void ComputeKv(const Step& step);
  StepOutput Sample(const Batch& batch) const;
  // The token behind the item's first `length`.
  TokenLogprob DrawBehind(const BatchItem& item, int length) const;
  absl::Status CheckItem(const BatchItem& item) const;
  absl::Status Check(const Batch& batch) const;
  uint64_t Row(const BatchItem& item, int layer, int position) const;
  uint64_t HistoryHash(const BatchItem& item, int length) const;

  const KvRegion region_;
  const FakeModelOptions options_;
  std::deque<Step> in_flight_;  // oldest first
  StepId last_launched_ = 0;
  std::vector<bool> last_draws_;                           // [items] of that step
  absl::StatusOr<StepOutput> last_output_ = StepOutput{};  // of the step collected last
  int num_runs_ = 0;
  int64_t num_tokens_ = 0;
};

// What the fake generates for one request alone, computed without any pool: the tokens up to and
// including an end (eos, stop token), max_tokens, or a total length of max_model_len.
std::vector<int32_t> FakeReferenceTokens(std::span<const int32_t> prompt,
                                         const SamplingParams& sampling, int max_model_len,
                                         int vocab_size = 1000, int num_layers = 2);

}  // namespace tandem::engine
