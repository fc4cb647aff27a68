#include "simulation/fake_model_runner.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

constexpr uint64_t kFirstRow = 0x243f6a8885a308d3;
constexpr uint64_t kBrokenRow = 0x7ff8dead7ff8dead;  // what a NaN is among numbers

// splitmix64's finaliser (Steele, Lea, Flood, 2014).
uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t z = a + 0x9e3779b97f4a7c15 * (b + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

uint64_t NextRow(uint64_t previous, int layer, int position, int32_t token) {
  if (previous == kBrokenRow) return kBrokenRow;
  const uint64_t place = static_cast<uint64_t>(layer) << 40 | static_cast<uint64_t>(position);
  return Mix(Mix(previous, place), static_cast<uint64_t>(token));
}

bool Contains(const std::vector<int32_t>& values, int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

bool IsEnd(const SamplingParams& sampling, int32_t token) {
  return (!sampling.ignore_eos && Contains(sampling.eos_token_ids, token)) ||
         Contains(sampling.stop_token_ids, token);
}

// `length` tokens precede the drawn one, `generated` of them not from the prompt.
int32_t Draw(uint64_t history, const SamplingParams& sampling, int length, int generated,
             int vocab_size) {
  if (sampling.temperature > 0) {
    history = Mix(Mix(history, sampling.seed), static_cast<uint64_t>(length));
  }
  const auto vocab = static_cast<uint64_t>(vocab_size);
  auto token = static_cast<int32_t>(history % vocab);
  for (int i = 0; i < vocab_size && generated < sampling.min_tokens && IsEnd(sampling, token);
       ++i) {
    token = static_cast<int32_t>((static_cast<uint64_t>(token) + 1) % vocab);
  }
  return token;
}

TokenLogprob MakeLogprob(int32_t token, uint64_t hash, int alternatives, int vocab_size) {
  TokenLogprob out;
  out.token = token;
  if (alternatives < 0) return out;
  out.logprob = -static_cast<float>(hash % 1024) / 128.0f;
  for (int i = 0; i < alternatives; ++i) {
    out.top.push_back(
        {static_cast<int32_t>((token + i) % vocab_size), out.logprob - static_cast<float>(i)});
  }
  return out;
}

}  // namespace

FakeKvMemory::FakeKvMemory(int num_blocks, int block_size, int num_layers) {
  region_.layout =
      KvLayout{num_layers, /*num_kv_heads=*/1, /*head_dim=*/2, block_size, DType::kFloat32};
  region_.num_blocks = num_blocks;
  region_.fd = memfd_create("tandem-fake-pool", MFD_CLOEXEC);
  void* data = MAP_FAILED;
  if (ftruncate(region_.fd, static_cast<off_t>(region_.TotalBytes())) == 0) {
    data = mmap(nullptr, region_.TotalBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, region_.fd, 0);
  }
  TANDEM_CHECK(data != MAP_FAILED, "no memory for {} blocks", num_blocks);
  region_.base = static_cast<std::byte*>(data);
  std::memset(region_.base, 0xcd, region_.TotalBytes());
}

FakeKvMemory::~FakeKvMemory() {
  munmap(region_.base, region_.TotalBytes());
  close(region_.fd);
}

std::vector<uint64_t> FakeBlockDigests(const KvRegion& region, std::span<const int32_t> blocks) {
  std::vector<uint64_t> digests;
  for (const int32_t block : blocks) {
    uint64_t digest = 0;
    for (int layer = 0; layer < region.layout.num_layers; ++layer) {
      const std::byte* bytes = region.Block(layer, block);
      for (size_t i = 0; i < region.layout.BlockLayerBytes(); ++i) {
        digest = Mix(digest, static_cast<uint64_t>(bytes[i]));
      }
    }
    digests.push_back(digest);
  }
  return digests;
}

FakeModelRunner::FakeModelRunner(const KvRegion& region, FakeModelOptions options)
    : region_(region), options_(std::move(options)) {
  TANDEM_CHECK(static_cast<size_t>(region_.layout.head_dim) * DTypeSize(region_.layout.dtype) >=
                   sizeof(uint64_t),
               "a KV row must hold 8 bytes");
}

FakeModelRunner::~FakeModelRunner() {
  for (Step& step : in_flight_) {
    for (const auto& event : step.layer_ready) event->Set();
  }
}

absl::Status FakeModelRunner::CheckItem(const BatchItem& item) const {
  const int end = item.start + item.num_tokens;
  const bool fits = item.sampling != nullptr ? item.length() == end : item.length() >= end;
  if (item.num_tokens <= 0 || item.start < 0 || !fits) {
    return InvalidArgument("item has start {} + {} tokens but a history of {}", item.start,
                           item.num_tokens, item.length());
  }
  const size_t from = static_cast<size_t>(item.pending.item);
  if (item.pending.step != 0 &&
      (item.pending.step != last_launched_ || from >= last_draws_.size() || !last_draws_[from])) {
    return InvalidArgument("item {} of step {} does not draw the pending token", item.pending.item,
                           item.pending.step);
  }
  if (static_cast<int>(item.block_table.size()) * region_.layout.block_size < end) {
    return InvalidArgument("block table of {} blocks does not cover {} positions",
                           item.block_table.size(), end);
  }
  for (int32_t block : item.block_table) {
    if (block < 0 || block >= region_.num_blocks) {
      return InvalidArgument("block {} is outside the pool of {}", block, region_.num_blocks);
    }
  }
  if (!item.draft.empty() && (item.sampling == nullptr || item.pending.step != 0 ||
                              item.num_tokens <= std::ssize(item.draft))) {
    return InvalidArgument("a draft of {} tokens in a run of {}", item.draft.size(),
                           item.num_tokens);
  }
  for (int p = 0; p < std::ssize(item.tokens) + std::ssize(item.draft); ++p) {
    const int32_t token = item.At(p);
    if (token < 0 || token >= options_.vocab_size) {
      return InvalidArgument("token {} is outside the vocabulary of {}", token,
                             options_.vocab_size);
    }
  }
  return absl::OkStatus();
}

absl::Status FakeModelRunner::Check(const Batch& batch) const {
  if (batch.NumTokens() > options_.max_num_batched_tokens) {
    return InvalidArgument("batch has {} tokens, limit {}", batch.NumTokens(),
                           options_.max_num_batched_tokens);
  }
  const int block_size = region_.layout.block_size;
  std::set<std::pair<int32_t, int>> written;  // (block, slot)
  for (const BatchItem& item : batch.items) {
    TANDEM_RETURN_IF_ERROR(CheckItem(item));
    for (int p = item.start; p < item.start + item.num_tokens; ++p) {
      const int32_t block = item.block_table[static_cast<size_t>(p / block_size)];
      if (!written.insert({block, p % block_size}).second) {
        return InvalidArgument("block {} slot {} is written twice in one batch", block,
                               p % block_size);
      }
    }
  }
  return absl::OkStatus();
}

uint64_t FakeModelRunner::Row(const BatchItem& item, int layer, int position) const {
  if (position < 0) return kFirstRow;
  const KvLayout& layout = region_.layout;
  const std::byte* block =
      region_.Block(layer, item.block_table[static_cast<size_t>(position / layout.block_size)]);
  const size_t row_bytes = static_cast<size_t>(layout.head_dim) * DTypeSize(layout.dtype);
  uint64_t row;
  std::memcpy(&row, block + static_cast<size_t>(position % layout.block_size) * row_bytes,
              sizeof(row));
  return row;
}

uint64_t FakeModelRunner::HistoryHash(const BatchItem& item, int length) const {
  uint64_t hash = 0;
  for (int p = 0; p < length; ++p) {
    for (int layer = 0; layer < region_.layout.num_layers; ++layer) {
      hash = Mix(hash, Row(item, layer, p));
    }
  }
  return hash;
}

absl::StatusOr<LaunchedStep> FakeModelRunner::Launch(const Batch& batch) {
  TANDEM_CHECK(in_flight_.size() < static_cast<size_t>(options_.max_in_flight),
               "{} steps are in flight already", in_flight_.size());
  TANDEM_RETURN_IF_ERROR(Check(batch));
  Step& step = in_flight_.emplace_back(Step{++last_launched_, BatchCopy(batch), {}});
  last_draws_.clear();
  for (const BatchItem& item : batch.items) {
    last_draws_.push_back(item.sampling != nullptr && item.draft.empty());
  }
  LaunchedStep launched{.id = step.id};
  for (int i = 0; batch.wants_layer_events && i < region_.layout.num_layers; ++i) {
    launched.layer_ready.push_back(step.layer_ready.emplace_back(std::make_shared<HostEvent>()));
  }
  return launched;
}

absl::StatusOr<StepOutput> FakeModelRunner::Collect(StepId id) {
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front().id == id,
               "step {} is not the oldest in flight", id);
  Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  last_output_ = Compute(&step);
  for (const auto& event : step.layer_ready) {
    if (!event->Ready()) event->Set();  // the step failed
  }
  return last_output_;
}

absl::StatusOr<StepOutput> FakeModelRunner::Compute(Step* step) {
  StepOutput broken;  // statuses of items whose pending token was not drawn
  broken.items.resize(step->inputs.batch().items.size());
  for (size_t i = 0; i < broken.items.size(); ++i) {
    const DrawnToken pending = step->inputs.batch().items[i].pending;
    if (pending.step == 0) continue;
    broken.items[i].status = last_output_.ok()
                                 ? last_output_->items[static_cast<size_t>(pending.item)].status
                                 : last_output_.status();
    const bool drawn = broken.items[i].status.ok();
    step->inputs.SetPending(
        i, drawn ? last_output_->items[static_cast<size_t>(pending.item)].token.token : 0);
  }
  const Batch& batch = step->inputs.batch();
  if (options_.before_run) TANDEM_RETURN_IF_ERROR(options_.before_run(batch));
  ++num_runs_;
  num_tokens_ += batch.NumTokens();
  ComputeKv(*step);
  StepOutput out = Sample(batch);
  for (size_t i = 0; i < broken.items.size(); ++i) {
    if (!broken.items[i].status.ok()) out.items[i] = broken.items[i];
  }
  return out;
}

void FakeModelRunner::ComputeKv(const Step& step) {
  const Batch& batch = step.inputs.batch();
  const KvLayout& layout = region_.layout;
  const size_t row_bytes = static_cast<size_t>(layout.head_dim) * DTypeSize(layout.dtype);
  std::vector<bool> broken;
  for (const BatchItem& item : batch.items) {
    broken.push_back(options_.breaks && options_.breaks(item));
  }
  for (int layer = 0; layer < layout.num_layers; ++layer) {
    for (size_t i = 0; i < batch.items.size(); ++i) {
      const BatchItem& item = batch.items[i];
      for (int p = item.start; p < item.start + item.num_tokens; ++p) {
        const uint64_t before = broken[i] ? kBrokenRow : Row(item, layer, p - 1);
        const uint64_t row = NextRow(before, layer, p, item.At(p));
        std::byte* block =
            region_.Block(layer, item.block_table[static_cast<size_t>(p / layout.block_size)]);
        std::memcpy(block + static_cast<size_t>(p % layout.block_size) * row_bytes, &row,
                    sizeof(row));
      }
    }
    if (!step.layer_ready.empty()) step.layer_ready[static_cast<size_t>(layer)]->Set();
  }
}

TokenLogprob FakeModelRunner::DrawBehind(const BatchItem& item, int length) const {
  const uint64_t history = HistoryHash(item, length);
  const int32_t token =
      Draw(history, *item.sampling, length, length - item.prompt_length, options_.vocab_size);
  return MakeLogprob(token, history, item.sampling->logprobs, options_.vocab_size);
}

StepOutput FakeModelRunner::Sample(const Batch& batch) const {
  StepOutput out;
  for (const BatchItem& item : batch.items) {
    const int length = item.start + item.num_tokens;
    ItemOutput& result = out.items.emplace_back();
    if (item.prompt_logprobs >= 0) {
      for (int p = item.start + 1; p <= length && p < item.prompt_length; ++p) {
        const int32_t token = item.tokens[static_cast<size_t>(p)];
        result.prompt_logprobs.push_back(
            MakeLogprob(token, HistoryHash(item, p), item.prompt_logprobs, options_.vocab_size));
      }
    }
    if (item.sampling == nullptr) continue;
    if (options_.item_status) result.status = options_.item_status(item);
    const int known = length - static_cast<int>(item.draft.size());
    if (Row(item, 0, known - 1) == kBrokenRow) result.status = Internal("no numbers came out");
    if (!result.status.ok()) continue;
    result.has_token = true;
    result.token = DrawBehind(item, known);
    int32_t last = result.token.token;
    for (int p = known; p < length && item.At(p) == last; ++p) {
      last = result.further.emplace_back(DrawBehind(item, p + 1)).token;
    }
  }
  return out;
}

std::vector<int32_t> FakeReferenceTokens(std::span<const int32_t> prompt,
                                         const SamplingParams& sampling, int max_model_len,
                                         int vocab_size, int num_layers) {
  std::vector<int32_t> tokens(prompt.begin(), prompt.end());
  const int prompt_length = static_cast<int>(prompt.size());
  std::vector<uint64_t> rows(static_cast<size_t>(num_layers), kFirstRow);
  uint64_t history = 0;
  int folded = 0;
  std::vector<int32_t> out;
  while (true) {
    for (; folded < static_cast<int>(tokens.size()); ++folded) {
      for (int layer = 0; layer < num_layers; ++layer) {
        uint64_t& row = rows[static_cast<size_t>(layer)];
        row = NextRow(row, layer, folded, tokens[static_cast<size_t>(folded)]);
        history = Mix(history, row);
      }
    }
    const int generated = static_cast<int>(out.size());
    const int32_t token = Draw(history, sampling, prompt_length + generated, generated, vocab_size);
    out.push_back(token);
    tokens.push_back(token);
    if (IsEnd(sampling, token) || static_cast<int>(out.size()) >= sampling.max_tokens ||
        static_cast<int>(tokens.size()) >= max_model_len) {
      return out;
    }
  }
}

}  // namespace tandem::engine
