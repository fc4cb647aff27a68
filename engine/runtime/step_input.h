// A batch laid out as the arrays that ops read: filled by the host, copied to the device in one go.
#pragma once

#include <array>
#include <cstdint>
#include <span>
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
};

// The arrays' memory. All but the token lists, which grow with what clients ask for, are allocated
// once: their addresses and sizes are the same for every step.
class StepArrays {
 public:
  enum Name {
    kTokenIds,     // int32 [rows]
    kPositions,    // int32 [rows]
    kFirstRows,    // int32 [items + 1]
    kStarts,       // int32 [items]
    kFirstBlocks,  // int32 [items + 1]
    kBlocks,       // int32, of all items
    kLogitRows,    // int32 [rows whose logits are wanted]
    kSpecs,        // DrawSpec [rows whose logits are wanted]
    kTokenLists,   // int32, what the specs point into
    kCount,
  };

  // In memory of the host (Device::AllocateStaging) or of the device.
  static absl::StatusOr<StepArrays> Create(const StepLimits& limits, bool staging, Device* device);

  template <typename T>
  T* as(Name name) const {
    return buffers_[name].as<T>();
  }
  // Room for at least `count` token ids in kTokenLists; what it held may be lost. Where it must
  // grow it waits for `reader`, a stream that may still read the old ones; null: none does.
  void ReserveTokenLists(size_t count, Stream* reader);

 private:
  bool staging_ = false;
  Device* device_ = nullptr;
  std::array<Buffer, kCount> buffers_;
};

// A row whose logits are wanted, and what becomes of them.
struct WantedLogits {
  int item = 0;
  int prompt_logprob = -1;  // index of the prompt token scored; -1: the item's next token is drawn
};

// The inputs of one step. Not thread-safe.
class StepInput {
 public:
  // `device` outlives this.
  static absl::StatusOr<StepInput> Create(const StepLimits& limits, Device* device);

  // Copies all that the step needs of `batch`, which was checked.
  void Fill(const Batch& batch, int block_size);
  // Gives `stream` the copy to the device's arrays. `arrays` is used where the device has memory of
  // its own; the steps of one stream share it.
  void Upload(StepArrays* arrays, Stream* stream);

  const RaggedBatch& host() const { return host_batch_; }
  // Of the last Upload, in memory of the device.
  const RaggedBatch& batch() const { return device_batch_; }
  const int32_t* logit_rows() const { return logit_rows_; }
  const DrawSpec* specs() const { return specs_; }
  const int32_t* token_lists() const { return token_lists_; }

  const std::vector<WantedLogits>& wanted() const { return wanted_; }
  int num_items() const { return host_batch_.num_items; }
  // Whose token the last of the item's run is: an item of the step before, or -1.
  int pending_of(int item) const { return pending_[static_cast<size_t>(item)]; }
  int num_prompt_logprobs(int item) const { return prompt_logprobs_[static_cast<size_t>(item)]; }

 private:
  StepInput(StepArrays host, Device* device) : host_(std::move(host)), device_(device) {}
  void FillItem(const BatchItem& item, int block_size);
  void WantLogits(const BatchItem& item, int first_row);
  void AddWanted(int row, const WantedLogits& wanted, const DrawSpec& spec);
  static RaggedBatch Over(const StepArrays& arrays, const RaggedBatch& counts);

  StepArrays host_;
  Device* device_;
  RaggedBatch host_batch_;
  RaggedBatch device_batch_;
  const int32_t* logit_rows_ = nullptr;
  const DrawSpec* specs_ = nullptr;
  const int32_t* token_lists_ = nullptr;
  std::vector<int32_t> lists_;  // becomes kTokenLists
  std::vector<WantedLogits> wanted_;
  std::vector<int> pending_;          // [items]
  std::vector<int> prompt_logprobs_;  // [items]: how many are wanted
};

}  // namespace tandem::engine
