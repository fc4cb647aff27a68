#include "engine/runtime/step_input.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "engine/runtime/sampler.h"

namespace tandem::engine {
namespace {

constexpr size_t kFirstTokenLists = 1024;

size_t ElementBytes(StepArrays::Name name) {
  return name == StepArrays::kSpecs ? sizeof(DrawSpec) : sizeof(int32_t);
}

}  // namespace

absl::StatusOr<StepArrays> StepArrays::Create(const StepLimits& limits, bool staging,
                                              Device* device) {
  const size_t rows = static_cast<size_t>(limits.max_rows);
  const size_t items = static_cast<size_t>(limits.max_items);
  const size_t blocks = items * static_cast<size_t>(limits.max_sequence_blocks);
  const size_t counts[kCount] = {rows,   rows, items + 1, items,           items + 1,
                                 blocks, rows, rows,      kFirstTokenLists};
  StepArrays arrays;
  arrays.staging_ = staging;
  arrays.device_ = device;
  for (int i = 0; i < kCount; ++i) {
    const size_t bytes = counts[i] * ElementBytes(static_cast<Name>(i));
    TANDEM_ASSIGN_OR_RETURN(arrays.buffers_[static_cast<size_t>(i)],
                            staging ? device->AllocateStaging(bytes) : device->Allocate(bytes));
  }
  return arrays;
}

void StepArrays::ReserveTokenLists(size_t count, Stream* reader) {
  Buffer& buffer = buffers_[kTokenLists];
  if (buffer.size() >= count * sizeof(int32_t)) return;
  if (reader != nullptr) reader->Synchronize();
  const size_t bytes = 2 * count * sizeof(int32_t);
  absl::StatusOr<Buffer> larger =
      staging_ ? device_->AllocateStaging(bytes) : device_->Allocate(bytes);
  TANDEM_CHECK(larger.ok(), "{}", larger.status().ToString());
  buffer = *std::move(larger);
}

absl::StatusOr<StepInput> StepInput::Create(const StepLimits& limits, Device* device) {
  TANDEM_ASSIGN_OR_RETURN(StepArrays host, StepArrays::Create(limits, true, device));
  return StepInput(std::move(host), device);
}

RaggedBatch StepInput::Over(const StepArrays& arrays, const RaggedBatch& counts) {
  RaggedBatch batch = counts;
  batch.token_ids = arrays.as<int32_t>(StepArrays::kTokenIds);
  batch.positions = arrays.as<int32_t>(StepArrays::kPositions);
  batch.first_rows = arrays.as<int32_t>(StepArrays::kFirstRows);
  batch.starts = arrays.as<int32_t>(StepArrays::kStarts);
  batch.first_blocks = arrays.as<int32_t>(StepArrays::kFirstBlocks);
  batch.blocks = arrays.as<int32_t>(StepArrays::kBlocks);
  return batch;
}

void StepInput::Fill(const Batch& batch, int block_size) {
  host_batch_ = Over(host_, RaggedBatch{});
  lists_.clear();
  wanted_.clear();
  pending_.clear();
  prompt_logprobs_.clear();
  host_.as<int32_t>(StepArrays::kFirstRows)[0] = 0;
  host_.as<int32_t>(StepArrays::kFirstBlocks)[0] = 0;
  for (const BatchItem& item : batch.items) FillItem(item, block_size);
  host_.ReserveTokenLists(lists_.size(), nullptr);
  if (!lists_.empty()) {
    std::memcpy(host_.as<int32_t>(StepArrays::kTokenLists), lists_.data(),
                lists_.size() * sizeof(int32_t));
  }
}

void StepInput::FillItem(const BatchItem& item, int block_size) {
  const size_t index = static_cast<size_t>(host_batch_.num_items++);
  const int first_row = host_batch_.num_rows;
  const int end = item.start + item.num_tokens;
  int32_t* ids = host_.as<int32_t>(StepArrays::kTokenIds);
  int32_t* positions = host_.as<int32_t>(StepArrays::kPositions);
  for (int position = item.start; position < end; ++position) {
    const size_t p = static_cast<size_t>(position),
                 row = static_cast<size_t>(host_batch_.num_rows++);
    ids[row] = p < item.tokens.size() ? item.tokens[p] : PendingId(item.pending.item);
    positions[row] = position;
  }
  const int blocks = BlocksFor(end, block_size);
  int32_t* first_blocks = host_.as<int32_t>(StepArrays::kFirstBlocks);
  std::copy_n(item.block_table.begin(), blocks,
              host_.as<int32_t>(StepArrays::kBlocks) + first_blocks[index]);
  first_blocks[index + 1] = first_blocks[index] + blocks;
  host_.as<int32_t>(StepArrays::kFirstRows)[index + 1] = host_batch_.num_rows;
  host_.as<int32_t>(StepArrays::kStarts)[index] = item.start;
  host_batch_.max_item_rows = std::max(host_batch_.max_item_rows, item.num_tokens);
  host_batch_.max_length = std::max(host_batch_.max_length, end);
  pending_.push_back(item.pending.step != 0 ? item.pending.item : -1);
  WantLogits(item, first_row);
}

void StepInput::WantLogits(const BatchItem& item, int first_row) {
  const int index = host_batch_.num_items - 1;
  prompt_logprobs_.push_back(0);
  if (item.prompt_logprobs >= 0) {
    const int end = item.start + item.num_tokens;
    const int last = std::min(end, item.prompt_length - 1);  // last position scored
    for (int i = 0; i < last - item.start; ++i) {
      DrawSpec spec;
      spec.item = index;
      spec.scored = item.tokens[static_cast<size_t>(item.start + i + 1)];
      spec.alternatives = item.prompt_logprobs;
      AddWanted(first_row + i, {index, i}, spec);
      ++prompt_logprobs_.back();
    }
  }
  if (item.sampling == nullptr) return;
  DrawSpec spec = MakeDrawSpec(*item.sampling, item, &lists_);
  spec.item = index;
  AddWanted(first_row + item.num_tokens - 1, {index, -1}, spec);
}

void StepInput::AddWanted(int row, const WantedLogits& wanted, const DrawSpec& spec) {
  host_.as<int32_t>(StepArrays::kLogitRows)[wanted_.size()] = row;
  host_.as<DrawSpec>(StepArrays::kSpecs)[wanted_.size()] = spec;
  wanted_.push_back(wanted);
}

void StepInput::Upload(StepArrays* arrays, Stream* stream) {
  const StepArrays* source = &host_;
  if (!device_->shares_host_memory()) {
    arrays->ReserveTokenLists(lists_.size(), stream);
    const size_t rows = static_cast<size_t>(host_batch_.num_rows);
    const size_t items = static_cast<size_t>(host_batch_.num_items);
    const size_t blocks = static_cast<size_t>(host_batch_.first_blocks[items]);
    const size_t counts[StepArrays::kCount] = {rows,           rows,           items + 1,
                                               items,          items + 1,      blocks,
                                               wanted_.size(), wanted_.size(), lists_.size()};
    for (int i = 0; i < StepArrays::kCount; ++i) {
      const auto name = static_cast<StepArrays::Name>(i);
      if (counts[i] == 0) continue;
      stream->CopyToDevice(arrays->as<void>(name), host_.as<void>(name),
                           counts[i] * ElementBytes(name));
    }
    source = arrays;
  }
  device_batch_ = Over(*source, host_batch_);
  logit_rows_ = source->as<int32_t>(StepArrays::kLogitRows);
  specs_ = source->as<DrawSpec>(StepArrays::kSpecs);
  token_lists_ = source->as<int32_t>(StepArrays::kTokenLists);
}

}  // namespace tandem::engine
