#include "engine/runtime/cpu_model_runner.h"

#include <algorithm>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

// Rows of logits that exist at one time: 39 MB at a vocabulary of 152k. The output head is read
// from memory once for so many rows.
constexpr size_t kLogitRows = 64;

}  // namespace

CpuModelRunner::CpuModelRunner(Qwen2* model, const KvRegion& kv, const Options& options,
                               Threads* threads)
    : model_(model),
      kv_(kv),
      options_(options),
      threads_(threads),
      logits_(kLogitRows * static_cast<size_t>(model->config().vocab_size) * sizeof(float)),
      scratch_(static_cast<size_t>(threads->count())) {}

CpuModelRunner::~CpuModelRunner() {
  for (Step& step : in_flight_) {
    for (const auto& event : step.layer_ready) event->Set();
  }
}

absl::Status CpuModelRunner::CheckPending(const BatchItem& item, size_t index) const {
  if (item.pending.step == 0) return absl::OkStatus();
  const size_t from = static_cast<size_t>(item.pending.item);
  if (item.pending.step != last_launched_ || from >= last_draws_.size() || !last_draws_[from] ||
      item.start + item.num_tokens != item.length()) {
    return InvalidArgument("batch item {}: item {} of step {} does not draw the token that ends it",
                           index, item.pending.item, item.pending.step);
  }
  return absl::OkStatus();
}

absl::Status CpuModelRunner::CheckItem(const BatchItem& item, size_t index) const {
  const size_t end = static_cast<size_t>(item.start) + static_cast<size_t>(item.num_tokens);
  const size_t length = static_cast<size_t>(item.length());
  if (item.start < 0 || item.num_tokens < 1 || length < end) {
    return InvalidArgument("batch item {}: {} tokens from {} do not lie in a sequence of {}", index,
                           item.num_tokens, item.start, length);
  }
  TANDEM_RETURN_IF_ERROR(CheckPending(item, index));
  const size_t block_size = static_cast<size_t>(kv_.layout.block_size);
  if (item.block_table.size() * block_size < end) {
    return InvalidArgument("batch item {}: {} blocks of {} tokens do not hold {} positions", index,
                           item.block_table.size(), block_size, end);
  }
  for (size_t i = 0; i < (end + block_size - 1) / block_size; ++i) {
    if (item.block_table[i] < 0 || item.block_table[i] >= kv_.num_blocks) {
      return InvalidArgument("batch item {}: block {} is outside of the pool of {}", index,
                             item.block_table[i], kv_.num_blocks);
    }
  }
  for (size_t i = static_cast<size_t>(item.start); i < std::min(end, item.tokens.size()); ++i) {
    if (item.tokens[i] < 0 || item.tokens[i] >= model_->config().vocab_size) {
      return InvalidArgument("token id {} at position {} is outside of the vocabulary of {}",
                             item.tokens[i], i, model_->config().vocab_size);
    }
  }
  if (item.sampling != nullptr && (length != end || item.prompt_length < 0 ||
                                   static_cast<size_t>(item.prompt_length) > length)) {
    return InvalidArgument("batch item {}: draws a token, so its {} tokens must end at {}", index,
                           length, end);
  }
  if (item.prompt_logprobs >= 0 && static_cast<size_t>(item.prompt_length) > end && length == end) {
    return InvalidArgument(
        "batch item {}: prompt_logprobs of a chunk that ends at {} of a prompt of {} need the "
        "token "
        "that follows the chunk",
        index, end, item.prompt_length);
  }
  return absl::OkStatus();
}

absl::Status CpuModelRunner::Check(const Batch& batch) const {
  int64_t total = 0;
  for (size_t i = 0; i < batch.items.size(); ++i) {
    TANDEM_RETURN_IF_ERROR(CheckItem(batch.items[i], i));
    total += batch.items[i].num_tokens;
  }
  if (total > options_.max_num_batched_tokens) {
    return InvalidArgument("a batch of {} tokens exceeds --max-num-batched-tokens={}", total,
                           options_.max_num_batched_tokens);
  }
  return absl::OkStatus();
}

std::vector<CpuModelRunner::LogitRow> CpuModelRunner::PlanLogits(const Batch& batch,
                                                                 StepOutput* output) const {
  std::vector<LogitRow> rows;
  int first_row = 0;
  for (size_t n = 0; n < batch.items.size(); ++n) {
    const BatchItem& item = batch.items[n];
    ItemOutput& out = output->items[n];
    const int end = item.start + item.num_tokens;
    if (item.prompt_logprobs >= 0) {
      const int last = std::min(end, item.prompt_length - 1);  // last position scored
      out.prompt_logprobs.resize(static_cast<size_t>(std::max(0, last - item.start)));
      for (size_t i = 0; i < out.prompt_logprobs.size(); ++i) {
        rows.push_back({first_row + static_cast<int>(i), static_cast<int>(n),
                        item.tokens[static_cast<size_t>(item.start) + i + 1],
                        &out.prompt_logprobs[i]});
      }
    }
    if (item.sampling != nullptr) {
      out.has_token = true;
      rows.push_back({first_row + item.num_tokens - 1, static_cast<int>(n), -1, &out.token});
    }
    first_row += item.num_tokens;
  }
  return rows;
}

void CpuModelRunner::ComputeLogits(const Batch& batch, const std::vector<LogitRow>& rows,
                                   StepOutput* output) {
  const size_t vocab = static_cast<size_t>(model_->config().vocab_size);
  const size_t valid = static_cast<size_t>(options_.valid_vocab_size);
  std::vector<int> tile;
  std::vector<absl::Status> statuses(kLogitRows);
  for (size_t first = 0; first < rows.size(); first += kLogitRows) {
    const size_t count = std::min(kLogitRows, rows.size() - first);
    tile.clear();
    for (size_t i = 0; i < count; ++i) tile.push_back(rows[first + i].row);
    model_->Logits(tile, logits_.floats());
    threads_->ForEach(count, count * vocab > 20000, [&](size_t i, int member) {
      const LogitRow& row = rows[first + i];
      const BatchItem& item = batch.items[static_cast<size_t>(row.item)];
      const std::span<const float> logits(logits_.floats() + i * vocab, valid);
      absl::StatusOr<TokenLogprob> result =
          row.scored >= 0
              ? ScoreToken(logits, row.scored, item.prompt_logprobs)
              : SampleToken(logits,
                            {item.tokens, static_cast<size_t>(item.prompt_length), item.sampling},
                            &scratch_[static_cast<size_t>(member)]);
      statuses[i] = result.status();
      if (result.ok()) *row.result = *std::move(result);
    });
    for (size_t i = 0; i < count; ++i) {
      ItemOutput& item = output->items[static_cast<size_t>(rows[first + i].item)];
      item.status.Update(statuses[i]);
      if (!item.status.ok()) item.has_token = false;
    }
  }
}

absl::StatusOr<LaunchedStep> CpuModelRunner::Launch(const Batch& batch) {
  TANDEM_CHECK(in_flight_.size() < static_cast<size_t>(options_.max_in_flight),
               "{} steps are in flight already", in_flight_.size());
  TANDEM_RETURN_IF_ERROR(Check(batch));
  Step& step = in_flight_.emplace_back(Step{++last_launched_, BatchCopy(batch), {}});
  last_draws_.clear();
  for (const BatchItem& item : batch.items) last_draws_.push_back(item.sampling != nullptr);
  LaunchedStep launched{.id = step.id};
  for (int i = 0; batch.wants_layer_events && i < model_->config().num_layers; ++i) {
    launched.layer_ready.push_back(step.layer_ready.emplace_back(std::make_shared<HostEvent>()));
  }
  return launched;
}

absl::StatusOr<StepOutput> CpuModelRunner::Collect(StepId id) {
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front().id == id,
               "step {} is not the oldest in flight", id);
  Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  StepOutput output = Compute(&step);
  if (options_.max_in_flight > 1) last_items_ = output.items;
  return output;
}

void CpuModelRunner::ResolvePending(Step* step, StepOutput* output) const {
  for (size_t i = 0; i < output->items.size(); ++i) {
    const DrawnToken& pending = step->inputs.batch().items[i].pending;
    if (pending.step == 0) continue;
    const ItemOutput& source = last_items_[static_cast<size_t>(pending.item)];
    output->items[i].status = source.status;
    step->inputs.SetPending(i, source.has_token ? source.token.token : 0);
  }
}

StepOutput CpuModelRunner::Compute(Step* step) {
  StepOutput output;
  output.items.resize(step->inputs.batch().items.size());
  ResolvePending(step, &output);
  const Batch& batch = step->inputs.batch();
  const std::vector<LogitRow> rows = PlanLogits(batch, &output);
  input_.tokens.clear();
  input_.positions.clear();
  input_.items.clear();
  for (const BatchItem& item : batch.items) {
    input_.items.push_back(
        {input_.tokens.size(), item.num_tokens, item.start, item.block_table.data()});
    for (int i = item.start; i < item.start + item.num_tokens; ++i) {
      input_.tokens.push_back(item.tokens[static_cast<size_t>(i)]);
      input_.positions.push_back(i);
    }
  }
  input_.need_hidden = !rows.empty();
  model_->Forward(input_, kv_, [&](int layer) {
    if (batch.on_layer_done) batch.on_layer_done(layer);
    if (!step->layer_ready.empty()) step->layer_ready[static_cast<size_t>(layer)]->Set();
  });
  ComputeLogits(batch, rows, &output);
  return output;
}

}  // namespace tandem::engine
