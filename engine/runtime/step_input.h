// A batch laid out as the arrays that ops read, in one piece of memory: filled by the host, copied
// to the device in one go.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"
#include "engine/device/device.h"
#include "engine/kernels/ops.h"
#include "engine/runtime/batch.h"

namespace tandem::engine {

struct StepLimits {
  int max_rows = 0;             // tokens of a step
  int max_items = 0;            // sequences of a step
  int max_sequence_blocks = 0;  // of one sequence
  // Token ids that penalties and masks usually need at most; for more the memory grows.
  int64_t list_tokens = 0;
};

// What decides where the arrays lie.
struct StepShape {
  int rows = 0;
  int items = 0;
  int wanted = 0;  // rows whose logits are wanted

  bool operator==(const StepShape&) const = default;
};

// The arrays of a step in one of its memories.
struct StepView {
  // `base` holds a step of this shape. max_item_rows and max_length are left to the caller.
  static StepView At(std::byte* base, const StepShape& shape);

  RaggedBatch batch;
  const int32_t* logit_rows = nullptr;   // [wanted]
  const DrawSpec* specs = nullptr;       // [wanted]
  const int32_t* token_lists = nullptr;  // what the specs point into
};

// A row whose logits are wanted, and what becomes of them.
struct WantedLogits {
  int item = 0;
  int prompt_logprob = -1;  // index of the prompt token scored; -1: a token of the item is drawn
  int drafted = 0;          // tokens of the item's draft before the drawn one
};

// The inputs of one step. Not thread-safe.
class StepInput {
 public:
  // `device` outlives this.
  static absl::StatusOr<StepInput> Create(const StepLimits& limits, Device* device);
  // Bytes of a step within the limits.
  static size_t BytesFor(const StepLimits& limits);

  // Copies all that the step needs of `batch`, which was checked. Where `padded_items` is more than
  // the batch has, one-row items that mean nothing follow (RaggedBatch), each with a draw, so that
  // steps of different batches have the same shape. That is for batches that only decode.
  void Fill(const Batch& batch, int block_size, int padded_items = 0);

  // What Fill wrote: memory of Device::AllocateStaging.
  const std::byte* data() const { return memory_.as<std::byte>(); }
  size_t bytes() const { return bytes_; }
  size_t capacity() const { return memory_.size(); }  // Fill() makes it larger where it must
  const StepShape& shape() const { return shape_; }
  // Of these bytes, wherever they were copied to.
  StepView ViewAt(std::byte* base) const;
  StepView host() const { return ViewAt(memory_.as<std::byte>()); }

  const std::vector<WantedLogits>& wanted() const { return wanted_; }  // padding left out
  int num_items() const { return num_items_; }                         // padding left out
  // Whose token the last of the item's run is: an item of the step before, or -1.
  int pending_of(int item) const { return pending_[static_cast<size_t>(item)]; }
  int num_prompt_logprobs(int item) const { return prompt_logprobs_[static_cast<size_t>(item)]; }

 private:
  StepInput(Buffer memory, Device* device) : memory_(std::move(memory)), device_(device) {}
  void Reserve(size_t bytes);
  void FillItem(const BatchItem& item, int block_size);
  void WantLogits(const BatchItem& item, int index, int first_row);
  void AddWanted(int row, const WantedLogits& wanted, const DrawSpec& spec);

  Buffer memory_;
  Device* device_;
  size_t bytes_ = 0;
  StepShape shape_;
  int max_item_rows_ = 0;
  int max_length_ = 0;
  int num_items_ = 0;
  // While it is filled: where it is written, and how much there is.
  StepView to_;
  int rows_ = 0;
  int32_t list_size_ = 0;  // blocks, then token lists

  std::vector<WantedLogits> wanted_;
  std::vector<int> pending_;          // [items]
  std::vector<int> prompt_logprobs_;  // [items]: how many are wanted
};

}  // namespace tandem::engine
