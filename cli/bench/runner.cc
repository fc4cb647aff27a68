// One thread sends everything and makes the next prompt while it waits, so that sending costs
// little when the time has come. Answers end on the client's threads, which leave a note.
#include "cli/bench/runner.h"

#include <algorithm>
#include <memory>

namespace tandem::cli {
namespace {

constexpr absl::Duration kProgressEvery = absl::Milliseconds(200);

}  // namespace

BenchRunner::Prepared BenchRunner::Prepare(size_t conversation, size_t turn,
                                           std::vector<uint32_t> said) const {
  const Turn& next = workload_[conversation].turns[turn];
  Prepared out;
  out.conversation = conversation;
  out.turn = turn;
  out.request.prompt = std::move(said);
  for (const Piece& piece : next.pieces) {
    AppendTokens(piece, options_.seed, options_.vocab_size, &out.request.prompt);
  }
  out.request.output_tokens = next.output_tokens;
  out.request.cache_salt = options_.cache_salt;
  out.request.timeout = options_.timeout;
  return out;
}

absl::Time BenchRunner::NextDue() const {
  if (next_ == workload_.size()) return absl::InfiniteFuture();
  if (options_.max_concurrency > 0 && free_.empty()) return absl::InfiniteFuture();
  if (!options_.open_loop) return start_;
  return start_ + absl::Seconds(workload_[next_].at_s);
}

void BenchRunner::StartDue() {
  while (clock_->Now() >= NextDue()) {
    absl::Time intended = NextDue();
    if (options_.max_concurrency > 0) {
      if (!options_.open_loop) intended = free_.front();
      free_.pop_front();
    }
    if (!prepared_) prepared_ = Prepare(next_, 0, {});
    ++next_;
    ++running_;
    Send(*std::exchange(prepared_, std::nullopt), intended);
  }
  if (!prepared_ && next_ < workload_.size()) prepared_ = Prepare(next_, 0, {});
}

void BenchRunner::Send(Prepared prepared, absl::Time intended) {
  RequestRecord record;
  record.conversation = prepared.conversation;
  record.turn = prepared.turn;
  record.intended = intended;
  record.prompt_tokens = static_cast<int>(prepared.request.prompt.size());
  record.sent = clock_->Now();
  const BenchRequest request = std::move(prepared.request);
  const bool more = prepared.turn + 1 < workload_[prepared.conversation].turns.size();
  const auto on_ended = [this, said = more ? request.prompt : std::vector<uint32_t>()](
                            RequestRecord ended, const std::vector<uint32_t>& answer) {
    std::vector<uint32_t> all = said;
    all.insert(all.end(), answer.begin(), answer.end());
    inbox_.Push({std::move(ended), std::move(all)});
  };
  client_->Start(request,
                 std::make_shared<Recorder>(std::move(record), clock_, &output_tokens_, on_ended));
}

void BenchRunner::FreePlace(absl::Time at) {
  if (options_.max_concurrency == 0) return;
  if (!options_.static_batches) {
    free_.push_back(at);
  } else if (running_ == 0) {
    free_.assign(static_cast<size_t>(options_.max_concurrency), at);
  }
}

void BenchRunner::Take(Ended ended, RunOutcome* outcome) {
  RequestRecord& record = ended.record;
  const size_t conversation = record.conversation;
  const absl::Time at = record.ended;
  const bool failed = !record.status.ok();
  const size_t next_turn = record.turn + 1;
  if (!stopping_ || !failed) outcome->records.push_back(std::move(record));
  if (!failed && !stopping_ && next_turn < workload_[conversation].turns.size()) {
    Send(Prepare(conversation, next_turn, std::move(ended.prompt_and_answer)), at);
    return;
  }
  --running_;
  ++progress_.ended;
  if (failed) ++progress_.failed;
  FreePlace(at);
}

RunOutcome BenchRunner::Run(std::span<const Conversation> workload, const OnProgress& on_progress) {
  workload_ = workload;
  next_ = 0;
  prepared_.reset();
  progress_ = {};
  output_tokens_ = 0;
  if (!workload.empty()) prepared_ = Prepare(0, 0, {});
  start_ = clock_->Now();
  free_.assign(static_cast<size_t>(options_.max_concurrency), start_);
  RunOutcome outcome;
  absl::Time next_progress = start_;
  while (running_ > 0 || (next_ < workload_.size() && !stopping_)) {
    if (stopping_) {
      client_->CancelAll();  // again each turn: a call may have started while the flag was set
    } else {
      StartDue();
    }
    const absl::Time now = clock_->Now();
    if (on_progress && now >= next_progress) {
      progress_.elapsed = now - start_;
      progress_.running = running_;
      progress_.output_tokens = output_tokens_;
      on_progress(progress_);
      next_progress = now + kProgressEvery;
    }
    const absl::Time next = stopping_ ? absl::InfiniteFuture() : NextDue();
    for (Ended& ended : inbox_.Drain(std::min(next - now, kProgressEvery))) {
      Take(std::move(ended), &outcome);
    }
  }
  outcome.duration = clock_->Now() - start_;
  outcome.stopped = stopping_;
  return outcome;
}

void BenchRunner::Stop() {
  stopping_ = true;
  inbox_.Wake();
}

}  // namespace tandem::cli
