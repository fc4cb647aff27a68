#include "engine/runtime/decoder_runner.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "engine/runtime/sampler.h"

namespace tandem::engine {
namespace {

// Rows of logits that exist at one time: 39 MB at a vocabulary of 152k. The output head is read
// from memory once for so many rows.
constexpr int kLogitRows = 64;

}  // namespace

DecoderLimits DecoderRunner::LimitsOf(const Options& options) {
  return {options.max_num_batched_tokens, options.max_num_seqs, kLogitRows};
}

absl::StatusOr<std::unique_ptr<DecoderRunner>> DecoderRunner::Create(const Options& options,
                                                                     const KvRegion& kv,
                                                                     Device* device,
                                                                     Decoder* decoder, Ops* ops) {
  std::unique_ptr<DecoderRunner> runner(new DecoderRunner(options, kv, device, decoder, ops));
  TANDEM_RETURN_IF_ERROR(runner->Allocate());
  return runner;
}

absl::Status DecoderRunner::Allocate() {
  const size_t rows = static_cast<size_t>(options_.max_num_batched_tokens);
  const size_t items = static_cast<size_t>(options_.max_num_seqs);
  const size_t vocab = static_cast<size_t>(decoder_->config().vocab_size);
  const StepLimits limits{options_.max_num_batched_tokens, options_.max_num_seqs,
                          kv_.layout.BlocksFor(options_.max_model_len)};
  stream_ = device_->NewStream();
  TANDEM_ASSIGN_OR_RETURN(logits_, device_->Allocate(kLogitRows * vocab * sizeof(float)));
  TANDEM_ASSIGN_OR_RETURN(device_results_, device_->Allocate(rows * sizeof(DrawResult)));
  for (Buffer& drawn : drawn_) {
    TANDEM_ASSIGN_OR_RETURN(drawn, device_->Allocate(items * sizeof(int32_t)));
  }
  if (!device_->shares_host_memory()) {
    TANDEM_ASSIGN_OR_RETURN(device_inputs_, StepArrays::Create(limits, false, device_));
  }
  steps_.reserve(static_cast<size_t>(options_.max_in_flight));
  for (int i = 0; i < options_.max_in_flight; ++i) {
    TANDEM_ASSIGN_OR_RETURN(StepInput input, StepInput::Create(limits, device_));
    TANDEM_ASSIGN_OR_RETURN(Buffer results, device_->AllocateStaging(rows * sizeof(DrawResult)));
    free_.push_back(&steps_.emplace_back(std::move(input), std::move(results)));
  }
  return absl::OkStatus();
}

DecoderRunner::~DecoderRunner() {
  if (stream_ == nullptr) return;
  if (!device_->asynchronous()) {
    // These steps never began: who waits for their layers is told that they are over.
    for (Step* step : in_flight_) {
      for (const auto& event : step->layer_ready) stream_->Record(event.get());
    }
  }
  stream_->Synchronize();
}

absl::Status DecoderRunner::CheckTokens(const BatchItem& item, size_t index) const {
  const int end = item.start + item.num_tokens;
  const int known =
      static_cast<int>(std::min<size_t>(item.tokens.size(), static_cast<size_t>(end)));
  const int vocab = decoder_->config().vocab_size;
  for (int i = item.start; i < known; ++i) {
    const int32_t id = item.tokens[static_cast<size_t>(i)];
    if (id < 0 || id >= vocab) {
      return InvalidArgument("token id {} at position {} is outside of the vocabulary of {}", id, i,
                             vocab);
    }
  }
  if (item.pending.step == 0) return absl::OkStatus();
  const size_t from = static_cast<size_t>(item.pending.item);
  if (item.pending.step != last_launched_ || from >= last_draws_.size() || !last_draws_[from] ||
      item.length() != end) {
    return InvalidArgument("batch item {}: item {} of step {} does not draw the token that ends it",
                           index, item.pending.item, item.pending.step);
  }
  return absl::OkStatus();
}

absl::Status DecoderRunner::CheckItem(const BatchItem& item, size_t index) const {
  const int end = item.start + item.num_tokens;
  if (item.start < 0 || item.num_tokens < 1 || item.length() < end) {
    return InvalidArgument("batch item {}: {} tokens from {} do not lie in a sequence of {}", index,
                           item.num_tokens, item.start, item.length());
  }
  if (end > options_.max_model_len) {
    return InvalidArgument("batch item {}: position {} is beyond --max-model-len={}", index, end,
                           options_.max_model_len);
  }
  const size_t blocks = static_cast<size_t>(kv_.layout.BlocksFor(end));
  if (item.block_table.size() < blocks) {
    return InvalidArgument("batch item {}: {} blocks of {} tokens do not hold {} positions", index,
                           item.block_table.size(), kv_.layout.block_size, end);
  }
  for (size_t i = 0; i < blocks; ++i) {
    if (item.block_table[i] < 0 || item.block_table[i] >= kv_.num_blocks) {
      return InvalidArgument("batch item {}: block {} is outside of the pool of {}", index,
                             item.block_table[i], kv_.num_blocks);
    }
  }
  if (item.sampling != nullptr &&
      (item.length() != end || item.prompt_length < 0 || item.prompt_length > item.length())) {
    return InvalidArgument("batch item {}: draws a token, so its {} tokens must end at {}", index,
                           item.length(), end);
  }
  if (item.prompt_logprobs >= 0 && item.prompt_length > end && item.length() == end) {
    return InvalidArgument(
        "batch item {}: prompt_logprobs of a chunk that ends at {} of a prompt of {} need the "
        "token that follows the chunk",
        index, end, item.prompt_length);
  }
  return CheckTokens(item, index);
}

absl::Status DecoderRunner::Check(const Batch& batch) const {
  if (batch.items.size() > static_cast<size_t>(options_.max_num_seqs)) {
    return InvalidArgument("a batch of {} sequences exceeds --max-num-seqs={}", batch.items.size(),
                           options_.max_num_seqs);
  }
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

absl::StatusOr<LaunchedStep> DecoderRunner::Launch(const Batch& batch) {
  TANDEM_CHECK(!free_.empty(), "{} steps are in flight already", in_flight_.size());
  TANDEM_RETURN_IF_ERROR(Check(batch));
  Step* step = free_.back();
  free_.pop_back();
  step->id = ++last_launched_;
  step->input.Fill(batch, kv_.layout.block_size);
  step->layer_ready.clear();
  step->done = device_->NewEvent();
  LaunchedStep launched{.id = step->id};
  for (int i = 0; batch.wants_layer_events && i < decoder_->config().num_layers; ++i) {
    launched.layer_ready.push_back(step->layer_ready.emplace_back(device_->NewEvent()));
  }
  last_draws_.clear();
  for (const BatchItem& item : batch.items) last_draws_.push_back(item.sampling != nullptr);
  in_flight_.push_back(step);
  if (device_->asynchronous()) Enqueue(step);
  return launched;
}

void DecoderRunner::Enqueue(Step* step) {
  StepInput& input = step->input;
  stream_->BeginStep(static_cast<int64_t>(step->id));
  input.Upload(&device_inputs_, stream_.get());
  const int32_t* drawn_before = drawn_[(step->id - 1) % 2].as<int32_t>();
  ForwardInput forward;
  forward.batch = &input.batch();
  forward.host = &input.host();
  forward.drawn = drawn_before;
  forward.need_hidden = !input.wanted().empty();
  forward.layer_ready = step->layer_ready;
  decoder_->Forward(forward, kv_, stream_.get());
  const int wanted = static_cast<int>(input.wanted().size());
  for (int first = 0; first < wanted; first += kLogitRows) {
    const int count = std::min(kLogitRows, wanted - first);
    decoder_->Logits(input.logit_rows() + first, count, logits_.as<float>(), stream_.get());
    SampleArgs sample;
    sample.logits = logits_.as<float>();
    sample.count = count;
    sample.valid_vocab = options_.valid_vocab_size;
    sample.specs = input.specs() + first;
    sample.token_lists = input.token_lists();
    sample.drawn_before = drawn_before;
    sample.drawn = drawn_[step->id % 2].as<int32_t>();
    sample.results = device_results_.as<DrawResult>() + first;
    ops_->Sample(sample, stream_.get());
  }
  stream_->CopyToHost(step->results.data(), device_results_.data(),
                      static_cast<size_t>(wanted) * sizeof(DrawResult));
  stream_->Record(step->done.get());
}

absl::StatusOr<StepOutput> DecoderRunner::Collect(StepId id) {
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front()->id == id,
               "step {} is not the oldest in flight", id);
  Step* step = in_flight_.front();
  if (!device_->asynchronous()) Enqueue(step);
  step->done->WaitFor(absl::InfiniteDuration());
  StepOutput output = ReadResults(*step);
  if (options_.max_in_flight > 1) collected_ = output.items;
  in_flight_.pop_front();
  free_.push_back(step);
  return output;
}

StepOutput DecoderRunner::ReadResults(const Step& step) const {
  const StepInput& input = step.input;
  const DrawResult* results = step.results.as<DrawResult>();
  StepOutput output;
  output.items.resize(static_cast<size_t>(input.num_items()));
  for (int i = 0; i < input.num_items(); ++i) {
    ItemOutput& item = output.items[static_cast<size_t>(i)];
    item.prompt_logprobs.resize(static_cast<size_t>(input.num_prompt_logprobs(i)));
    // What could not be drawn has no successor either.
    if (input.pending_of(i) >= 0) {
      item.status = collected_[static_cast<size_t>(input.pending_of(i))].status;
    }
  }
  for (size_t i = 0; i < input.wanted().size(); ++i) {
    const WantedLogits& wanted = input.wanted()[i];
    ItemOutput& item = output.items[static_cast<size_t>(wanted.item)];
    absl::StatusOr<TokenLogprob> result = ReadDraw(results[i], options_.valid_vocab_size);
    item.status.Update(result.status());
    if (!result.ok()) continue;
    if (wanted.prompt_logprob >= 0) {
      item.prompt_logprobs[static_cast<size_t>(wanted.prompt_logprob)] = *std::move(result);
    } else {
      item.has_token = true;
      item.token = *std::move(result);
    }
  }
  for (ItemOutput& item : output.items) {
    if (!item.status.ok()) item.has_token = false;
  }
  return output;
}

}  // namespace tandem::engine
