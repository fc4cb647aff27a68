#include "engine/runtime/decoder_runner.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "engine/runtime/decode_sizes.h"
#include "engine/runtime/sampler.h"

namespace tandem::engine {
namespace {

// Whether the draft's first `drafted` tokens were drawn, so that the token drawn behind them
// counts.
bool FollowsDraft(const ItemOutput& item, int drafted, int32_t last_drafted) {
  if (drafted == 0) return true;
  if (!item.has_token || std::ssize(item.further) + 1 < drafted) return false;
  const TokenLogprob& drawn = drafted == 1 ? item.token : item.further.back();
  return drawn.token == last_drafted;
}

}  // namespace

DecoderLimits DecoderRunner::LimitsOf(const Options& options) {
  return {options.max_num_batched_tokens, options.max_num_seqs, options.max_logit_rows};
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
  // Penalties read the tokens of sequences, which lie in the pool; with many shared prefixes they
  // may be more than that.
  const StepLimits limits{options_.max_num_batched_tokens, options_.max_num_seqs,
                          kv_.layout.BlocksFor(options_.max_model_len),
                          std::min(int64_t{options_.max_num_seqs} * options_.max_model_len,
                                   int64_t{kv_.num_blocks} * kv_.layout.block_size)};
  stream_ = device_->NewStream();
  TANDEM_ASSIGN_OR_RETURN(logits_, device_->Allocate(static_cast<size_t>(options_.max_logit_rows) *
                                                     vocab * sizeof(float)));
  for (Buffer& drawn : drawn_) {
    TANDEM_ASSIGN_OR_RETURN(drawn, device_->Allocate(items * sizeof(int32_t)));
  }
  if (!device_->shares_host_memory()) {
    TANDEM_ASSIGN_OR_RETURN(device_inputs_, device_->Allocate(StepInput::BytesFor(limits)));
  }
  steps_.reserve(static_cast<size_t>(options_.max_in_flight));
  for (int i = 0; i < options_.max_in_flight; ++i) {
    TANDEM_ASSIGN_OR_RETURN(StepInput input, StepInput::Create(limits, device_));
    TANDEM_ASSIGN_OR_RETURN(Buffer results, device_->AllocateStaging(rows * sizeof(DrawResult)));
    steps_.emplace_back(std::move(input), std::move(results));
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
  const int known = std::min(item.length() - (item.pending.step != 0 ? 1 : 0), end);
  const int vocab = decoder_->config().vocab_size;
  for (int i = item.start; i < known; ++i) {
    const int32_t id = item.At(i);
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

absl::Status DecoderRunner::CheckDraft(const BatchItem& item, size_t index) const {
  if (item.draft.empty()) return absl::OkStatus();
  if (item.sampling == nullptr || item.pending.step != 0 ||
      static_cast<size_t>(item.num_tokens) <= item.draft.size()) {
    return InvalidArgument(
        "batch item {}: a draft of {} tokens needs a token before it in the run of {}, a draw, and "
        "no pending token",
        index, item.draft.size(), item.num_tokens);
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
  TANDEM_RETURN_IF_ERROR(CheckDraft(item, index));
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
  TANDEM_CHECK(in_flight_.size() < steps_.size(), "{} steps are in flight already",
               in_flight_.size());
  TANDEM_RETURN_IF_ERROR(Check(batch));
  Step* step = StepOf(++last_launched_);
  step->id = last_launched_;
  const int recorded_size = RecordedSizeOf(batch);
  step->recorded = recorded_size > 0;
  const size_t capacity = step->input.capacity();
  step->input.Fill(batch, kv_.layout.block_size, recorded_size);
  if (step->input.capacity() != capacity) decoder_->MeetRanks();
  step->layer_ready.clear();
  step->done = device_->NewEvent();
  LaunchedStep launched{.id = step->id};
  for (int i = 0; batch.wants_layer_events && i < decoder_->config().num_layers; ++i) {
    launched.layer_ready.push_back(step->layer_ready.emplace_back(device_->NewEvent()));
  }
  last_draws_.clear();
  for (const BatchItem& item : batch.items) {
    last_draws_.push_back(item.sampling != nullptr && item.draft.empty());
  }
  in_flight_.push_back(step);
  if (device_->asynchronous()) Enqueue(step);
  return launched;
}

int DecoderRunner::RecordedSizeOf(const Batch& batch) const {
  if (sizes_.empty() || batch.wants_layer_events) return 0;
  for (const BatchItem& item : batch.items) {
    if (item.num_tokens != 1 || item.sampling == nullptr || item.prompt_logprobs >= 0) return 0;
  }
  return DecodeSizeFor(static_cast<int>(batch.items.size()), sizes_);
}

void DecoderRunner::RecordDecodeSteps() {
  TANDEM_CHECK(steps_.size() <= 2, "a graph would write where another step in flight writes");
  const absl::Time start = absl::Now();
  const std::vector<int> sizes =
      DecodeSizes(std::min(options_.max_num_seqs, options_.max_num_batched_tokens));
  sizes_.clear();
  graphs_.clear();
  for (const int size : sizes) {
    StepView inputs = StepView::At(device_inputs_.as<std::byte>(), {size, size, size});
    inputs.batch.max_item_rows = 1;
    inputs.batch.max_length = options_.max_model_len;
    RaggedBatch numbers;  // of every batch of this size
    numbers.num_rows = numbers.num_items = size;
    numbers.max_item_rows = inputs.batch.max_item_rows;
    numbers.max_length = inputs.batch.max_length;
    std::array<std::unique_ptr<Graph>, 2> graphs;
    for (const StepId id : {1, 2}) {
      graphs[id % 2] =
          stream_->Capture([&] { Compute(inputs, &numbers, size, id, /*layer_ready=*/{}); });
      if (graphs[id % 2] == nullptr) return;
    }
    sizes_.push_back(size);
    graphs_.push_back(std::move(graphs));
  }
  spdlog::info("decode steps of up to {} sequences recorded as {} graphs in {:.1f} s",
               sizes_.empty() ? 0 : sizes_.back(), 2 * graphs_.size(),
               absl::ToDoubleSeconds(absl::Now() - start));
}

std::byte* DecoderRunner::Upload(const StepInput& input) {
  if (device_inputs_.size() < input.bytes()) {
    stream_->Synchronize();
    absl::StatusOr<Buffer> larger = device_->Allocate(2 * input.bytes());
    TANDEM_CHECK(larger.ok(), "{}", larger.status().ToString());
    device_inputs_ = *std::move(larger);
    if (!sizes_.empty()) RecordDecodeSteps();  // the old ones lead into memory that is gone
    decoder_->MeetRanks();
  }
  stream_->CopyToDevice(device_inputs_.data(), input.data(), input.bytes());
  return device_inputs_.as<std::byte>();
}

void DecoderRunner::Enqueue(Step* step) {
  const StepInput& input = step->input;
  stream_->BeginStep(static_cast<int64_t>(step->id));
  const StepView host = input.host();
  const StepView inputs = device_->shares_host_memory() ? host : input.ViewAt(Upload(input));
  if (step->recorded) {
    const auto at = std::lower_bound(sizes_.begin(), sizes_.end(), input.shape().items);
    stream_->Launch(graphs_[static_cast<size_t>(at - sizes_.begin())][step->id % 2].get());
  } else {
    Compute(inputs, &host.batch, input.shape().wanted, step->id, step->layer_ready);
  }
  stream_->Record(step->done.get());
}

void DecoderRunner::Compute(const StepView& inputs, const RaggedBatch* host, int wanted, StepId id,
                            std::span<const std::shared_ptr<Event>> layer_ready) {
  const int32_t* drawn_before = drawn_[(id - 1) % 2].as<int32_t>();
  ForwardInput forward;
  forward.batch = &inputs.batch;
  forward.host = host;
  forward.drawn = drawn_before;
  forward.need_hidden = wanted > 0;
  if (wanted <= options_.max_logit_rows) {
    forward.wanted = inputs.logit_rows;
    forward.num_wanted = wanted;
  }
  forward.layer_ready = layer_ready;
  decoder_->Forward(forward, kv_, stream_.get());
  for (int first = 0; first < wanted; first += options_.max_logit_rows) {
    const int count = std::min(options_.max_logit_rows, wanted - first);
    decoder_->Logits(inputs.logit_rows + first, count, logits_.as<float>(), stream_.get());
    SampleArgs sample;
    sample.logits = logits_.as<float>();
    sample.count = count;
    sample.valid_vocab = options_.valid_vocab_size;
    sample.specs = inputs.specs + first;
    sample.token_lists = inputs.token_lists;
    sample.drawn_before = drawn_before;
    sample.drawn = drawn_[id % 2].as<int32_t>();
    sample.results = StepOf(id)->results.as<DrawResult>() + first;
    ops_->Sample(sample, stream_.get());
  }
}

absl::StatusOr<StepOutput> DecoderRunner::Collect(StepId id) {
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front()->id == id,
               "step {} is not the oldest in flight", id);
  Step* step = in_flight_.front();
  if (!device_->asynchronous()) Enqueue(step);
  step->done->WaitFor(absl::InfiniteDuration());
  StepOutput output = ReadResults(*step);
  if (options_.max_in_flight > 1) {
    collected_.clear();
    for (const ItemOutput& item : output.items) collected_.push_back(item.status);
  }
  in_flight_.pop_front();
  return output;
}

StepOutput DecoderRunner::ReadResults(const Step& step) const {
  const StepInput& input = step.input;
  const DrawResult* results = step.results.as<DrawResult>();
  const StepView host = input.host();
  const int32_t* ids = host.batch.token_ids;
  const int32_t* rows = host.logit_rows;
  StepOutput output;
  output.items.resize(static_cast<size_t>(input.num_items()));
  for (int i = 0; i < input.num_items(); ++i) {
    ItemOutput& item = output.items[static_cast<size_t>(i)];
    item.prompt_logprobs.resize(static_cast<size_t>(input.num_prompt_logprobs(i)));
    // What could not be drawn has no successor either.
    if (input.pending_of(i) >= 0) {
      item.status = collected_[static_cast<size_t>(input.pending_of(i))];
    }
  }
  for (size_t i = 0; i < input.wanted().size(); ++i) {
    const WantedLogits& wanted = input.wanted()[i];
    ItemOutput& item = output.items[static_cast<size_t>(wanted.item)];
    if (!FollowsDraft(item, wanted.drafted, ids[rows[i]])) continue;
    absl::StatusOr<TokenLogprob> result = ReadDraw(results[i], options_.valid_vocab_size);
    item.status.Update(result.status());
    if (!result.ok()) continue;
    if (wanted.prompt_logprob >= 0) {
      item.prompt_logprobs[static_cast<size_t>(wanted.prompt_logprob)] = *std::move(result);
    } else if (wanted.drafted > 0) {
      item.further.push_back(*std::move(result));
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
