// ModelRunner over a Decoder on any device: copies batches to the device, gives its stream the
// forward pass and the draws, and reads the tokens back.
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"
#include "engine/device/device.h"
#include "engine/kernels/ops.h"
#include "engine/model/decoder.h"
#include "engine/runtime/model_runner.h"
#include "engine/runtime/step_input.h"

namespace tandem::engine {

// Not thread-safe, as every ModelRunner.
//
// On an asynchronous device Launch gives the whole step to the stream and Collect waits for its
// end. On others (the CPU) a stream works at once, so the step runs inside Collect: thus the loop
// has the step's events before its layers are computed, and what waits for them overlaps with the
// compute.
//
// A step of an asynchronous device is one copy of its inputs, the work, which writes its results
// where the host reads them, and an event. Nothing waits but Collect, and nothing but the inputs
// depends on the batch in steps that only decode: they are recorded once (RecordDecodeSteps).
class DecoderRunner final : public ModelRunner {
 public:
  struct Options {
    int max_num_batched_tokens = 512;
    int max_num_seqs = 64;
    int max_model_len = 0;     // tokens
    int valid_vocab_size = 0;  // token ids below this can be drawn; the rest are padding rows
    int max_in_flight = 1;
    // Rows of logits that exist at one time: 39 MB for 64 at a vocabulary of 152k. The output head
    // is read from memory once for so many rows.
    int max_logit_rows = 64;
  };

  // What the model's decoder and ops must be made for.
  static DecoderLimits LimitsOf(const Options& options);

  // All memory is allocated here. `device`, `decoder`, `ops` and the region's memory outlive the
  // runner.
  static absl::StatusOr<std::unique_ptr<DecoderRunner>> Create(const Options& options,
                                                               const KvRegion& kv, Device* device,
                                                               Decoder* decoder, Ops* ops);
  ~DecoderRunner() override;

  // Records the steps that only decode, by the number of sequences, where the device has graphs:
  // from then on such a step is one call. Called once, before steps are launched; logs what it
  // took.
  void RecordDecodeSteps();

  int max_in_flight() const override { return options_.max_in_flight; }
  const std::atomic<uint64_t>* progress() const override { return &decoder_->layers_done(); }
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override;
  absl::StatusOr<StepOutput> Collect(StepId id) override;

 private:
  // What belongs to one step in flight; used again for a later one.
  struct Step {
    Step(StepInput step_input, Buffer host_results)
        : input(std::move(step_input)), results(std::move(host_results)) {}
    StepId id = 0;
    bool recorded = false;  // it is one of graphs_
    StepInput input;
    // DrawResult [rows whose logits are wanted], in staging memory: draws write there themselves.
    Buffer results;
    std::vector<std::shared_ptr<Event>> layer_ready;  // [num_layers] or empty
    std::shared_ptr<Event> done;                      // the results have arrived
  };

  DecoderRunner(const Options& options, const KvRegion& kv, Device* device, Decoder* decoder,
                Ops* ops)
      : options_(options), kv_(kv), device_(device), decoder_(decoder), ops_(ops) {}
  absl::Status Allocate();
  absl::Status Check(const Batch& batch) const;
  absl::Status CheckItem(const BatchItem& item, size_t index) const;
  absl::Status CheckTokens(const BatchItem& item, size_t index) const;
  absl::Status CheckDraft(const BatchItem& item, size_t index) const;
  // The size to which the batch is padded for a recorded step; 0: it is none that is recorded.
  int RecordedSizeOf(const Batch& batch) const;
  // Gives the stream all of the step's work.
  void Enqueue(Step* step);
  // The step's inputs in memory of the device.
  std::byte* Upload(const StepInput& input);
  // The memory of a step in flight.
  Step* StepOf(StepId id) { return &steps_[id % steps_.size()]; }
  // Forward pass and draws of step `id`, of which only the parity matters. `host`: the inputs in
  // memory of the host; without arrays while it is recorded.
  void Compute(const StepView& inputs, const RaggedBatch* host, int wanted, StepId id,
               std::span<const std::shared_ptr<Event>> layer_ready);
  StepOutput ReadResults(const Step& step) const;

  const Options options_;
  const KvRegion kv_;
  Device* const device_;
  Decoder* const decoder_;
  Ops* const ops_;
  std::unique_ptr<Stream> stream_;
  Buffer device_inputs_;    // of a device with memory of its own: those of the step that runs
  Buffer logits_;           // float [max_logit_rows][vocab]
  Buffer drawn_[2];         // int32 [max_num_seqs], by parity of the step
  std::vector<int> sizes_;  // of recorded steps; none before RecordDecodeSteps
  // By size and parity of the step: a step reads what the one before drew and writes beside it.
  std::vector<std::array<std::unique_ptr<Graph>, 2>> graphs_;
  std::vector<Step> steps_;      // [max_in_flight]: see StepOf
  std::deque<Step*> in_flight_;  // oldest first
  StepId last_launched_ = 0;
  std::vector<bool> last_draws_;         // [items] of that step
  std::vector<absl::Status> collected_;  // of the step collected last, for who took tokens from it
};

}  // namespace tandem::engine
