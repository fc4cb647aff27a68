#include "engine/runtime/step_input.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "engine/runtime/sampler.h"

namespace tandem::engine {
namespace {

// The arrays of a step are written through the same view that ops read them by.
template <typename T>
T* Writable(const T* array) {
  return const_cast<T*>(array);
}

size_t Rows(int count) { return static_cast<size_t>(count); }

// Deals out arrays that follow each other; with no base it only counts.
class Places {
 public:
  explicit Places(std::byte* base) : base_(base) {}
  template <typename T>
  T* Take(size_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ = (used_ + count * sizeof(T) + 15) / 16 * 16;
    return at;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

StepView Place(const StepShape& shape, Places* places) {
  StepView view;
  view.batch.num_rows = shape.rows;
  view.batch.num_items = shape.items;
  view.batch.token_ids = places->Take<int32_t>(Rows(shape.rows));
  view.batch.positions = places->Take<int32_t>(Rows(shape.rows));
  view.batch.first_rows = places->Take<int32_t>(Rows(shape.items + 1));
  view.batch.starts = places->Take<int32_t>(Rows(shape.items));
  view.batch.first_blocks = places->Take<int32_t>(Rows(shape.items + 1));
  view.logit_rows = places->Take<int32_t>(Rows(shape.wanted));
  view.specs = places->Take<DrawSpec>(Rows(shape.wanted));
  // The only ones whose length the shape does not tell, in one array: first the blocks.
  view.batch.blocks = view.token_lists = places->Take<int32_t>(0);
  return view;
}

size_t FixedBytes(const StepShape& shape) {
  Places places(nullptr);
  Place(shape, &places);
  return places.used();
}

// How many rows of the item are scored for prompt_logprobs.
int NumScored(const BatchItem& item) {
  if (item.prompt_logprobs < 0) return 0;
  const int last = std::min(item.start + item.num_tokens, item.prompt_length - 1);
  return std::max(0, last - item.start);
}

int NumDrawn(const BatchItem& item) {
  return item.sampling != nullptr ? static_cast<int>(item.draft.size()) + 1 : 0;
}

}  // namespace

StepView StepView::At(std::byte* base, const StepShape& shape) {
  Places places(base);
  return Place(shape, &places);
}

size_t StepInput::BytesFor(const StepLimits& limits) {
  const size_t lists = Rows(limits.max_items) * Rows(limits.max_sequence_blocks) +
                       static_cast<size_t>(limits.list_tokens);
  return FixedBytes({limits.max_rows, limits.max_items, limits.max_rows}) + lists * sizeof(int32_t);
}

absl::StatusOr<StepInput> StepInput::Create(const StepLimits& limits, Device* device) {
  TANDEM_ASSIGN_OR_RETURN(Buffer memory, device->AllocateStaging(BytesFor(limits)));
  StepInput input(std::move(memory), device);
  input.wanted_.reserve(Rows(limits.max_items));
  input.pending_.reserve(Rows(limits.max_items));
  input.prompt_logprobs_.reserve(Rows(limits.max_items));
  return input;
}

void StepInput::Reserve(size_t bytes) {
  if (memory_.size() >= bytes) return;
  absl::StatusOr<Buffer> larger = device_->AllocateStaging(2 * bytes);
  TANDEM_CHECK(larger.ok(), "{}", larger.status().ToString());
  memory_ = *std::move(larger);
}

StepView StepInput::ViewAt(std::byte* base) const {
  StepView view = StepView::At(base, shape_);
  view.batch.max_item_rows = max_item_rows_;
  view.batch.max_length = max_length_;
  return view;
}

void StepInput::Fill(const Batch& batch, int block_size, int padded_items) {
  num_items_ = static_cast<int>(batch.items.size());
  const int padding = std::max(0, padded_items - num_items_);
  shape_ = {padding, num_items_ + padding, padding};
  size_t list_size = 0;
  for (const BatchItem& item : batch.items) {
    shape_.rows += item.num_tokens;
    shape_.wanted += NumScored(item) + NumDrawn(item);
    list_size += Rows(BlocksFor(item.start + item.num_tokens, block_size));
    if (item.sampling != nullptr) list_size += MaxListTokens(*item.sampling, item);
  }
  Reserve(FixedBytes(shape_) + list_size * sizeof(int32_t));

  to_ = StepView::At(memory_.as<std::byte>(), shape_);
  rows_ = 0;
  list_size_ = 0;
  max_item_rows_ = padding > 0 ? 1 : 0;
  max_length_ = 0;
  wanted_.clear();
  pending_.clear();
  prompt_logprobs_.clear();
  Writable(to_.batch.first_rows)[0] = 0;
  Writable(to_.batch.first_blocks)[0] = 0;
  for (const BatchItem& item : batch.items) FillItem(item, block_size);
  for (int i = num_items_; i < shape_.items; ++i) {
    Writable(to_.batch.token_ids)[rows_] = 0;
    Writable(to_.batch.positions)[rows_] = 0;
    Writable(to_.batch.starts)[i] = -1;
    Writable(to_.batch.first_blocks)[i + 1] = list_size_;
    Writable(to_.batch.first_rows)[i + 1] = ++rows_;
  }
  // After all blocks.
  for (int i = 0; i < num_items_; ++i) {
    WantLogits(batch.items[static_cast<size_t>(i)], i, to_.batch.first_rows[i]);
  }
  for (int i = num_items_; i < shape_.items; ++i) {
    DrawSpec spec;  // the cheapest
    spec.item = i;
    const int at = shape_.wanted - shape_.items + i;
    Writable(to_.logit_rows)[at] = to_.batch.first_rows[i];
    Writable(to_.specs)[at] = spec;
  }
  bytes_ = FixedBytes(shape_) + static_cast<size_t>(list_size_) * sizeof(int32_t);
}

void StepInput::FillItem(const BatchItem& item, int block_size) {
  const size_t index = pending_.size();
  const int end = item.start + item.num_tokens;
  int32_t* ids = Writable(to_.batch.token_ids);
  int32_t* positions = Writable(to_.batch.positions);
  for (int position = item.start; position < end; ++position, ++rows_) {
    const bool pending = item.pending.step != 0 && position + 1 == item.length();
    ids[rows_] = pending ? PendingId(item.pending.item) : item.At(position);
    positions[rows_] = position;
  }
  const int blocks = BlocksFor(end, block_size);
  std::copy_n(item.block_table.begin(), blocks, Writable(to_.batch.blocks) + list_size_);
  list_size_ += blocks;
  Writable(to_.batch.first_blocks)[index + 1] = list_size_;
  Writable(to_.batch.first_rows)[index + 1] = rows_;
  Writable(to_.batch.starts)[index] = item.start;
  max_item_rows_ = std::max(max_item_rows_, item.num_tokens);
  max_length_ = std::max(max_length_, end);
  pending_.push_back(item.pending.step != 0 ? item.pending.item : -1);
  prompt_logprobs_.push_back(NumScored(item));
}

void StepInput::WantLogits(const BatchItem& item, int index, int first_row) {
  for (int i = 0; i < NumScored(item); ++i) {
    DrawSpec spec;
    spec.item = index;
    spec.scored = item.tokens[static_cast<size_t>(item.start + i + 1)];
    spec.alternatives = item.prompt_logprobs;
    AddWanted(first_row + i, {.item = index, .prompt_logprob = i}, spec);
  }
  const int drawn = NumDrawn(item);
  const int first_drawn = first_row + item.num_tokens - drawn;
  for (int i = 0; i < drawn; ++i) {
    TokenLists lists{Writable(to_.token_lists), list_size_};
    DrawSpec spec = MakeDrawSpec(*item.sampling, item, static_cast<size_t>(i), &lists);
    list_size_ = lists.size;
    spec.item = drawn == 1 ? index : -1;
    AddWanted(first_drawn + i, {.item = index, .drafted = i}, spec);
  }
}

void StepInput::AddWanted(int row, const WantedLogits& wanted, const DrawSpec& spec) {
  Writable(to_.logit_rows)[wanted_.size()] = row;
  Writable(to_.specs)[wanted_.size()] = spec;
  wanted_.push_back(wanted);
}

}  // namespace tandem::engine
