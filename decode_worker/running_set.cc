#include "decode_worker/running_set.h"

#include <algorithm>
#include <span>
#include <utility>

#include "common/base/check.h"

namespace tandem::decode {

RunningSet::RunningSet(engine::BlockPool* pool, engine::PrefixCache* cache,
                       worker::LaunchedSteps* steps)
    : pool_(pool), cache_(cache), steps_(steps) {}

void RunningSet::Insert(std::unique_ptr<Sequence> sequence) {
  TANDEM_CHECK(sequence->work.id != 0, "0 names no sequence");
  by_id_[sequence->work.id] = sequence.get();
  const auto place = std::upper_bound(
      sequences_.begin(), sequences_.end(), sequence->work.priority,
      [](int priority, const auto& other) { return priority > other->work.priority; });
  sequences_.insert(place, std::move(sequence));
}

Sequence* RunningSet::Find(uint64_t id) const {
  const auto it = by_id_.find(id);
  return it == by_id_.end() || it->second->closed ? nullptr : it->second;
}

void RunningSet::Sweep() {
  std::erase_if(sequences_, [this](const auto& s) {
    if (s->closed) by_id_.erase(s->work.id);
    return s->closed;
  });
}

View RunningSet::MakeView() const {
  View view;
  view.free_blocks = pool_->NumAvailable();
  view.returning_blocks = steps_->num_returning_blocks();
  view.sequences.reserve(sequences_.size());
  for (const auto& s : sequences_) {
    view.sequences.push_back({.phase = s->phase,
                              .length = s->length() + (s->token_pending() ? 1 : 0),
                              .computed = s->launched,
                              .blocks = s->lease.size(),
                              .paused = s->paused(),
                              .token_pending = s->token_pending(),
                              // Launched and not collected is what the two counters differ in.
                              .in_flight = s->launched > s->computed,
                              .max_length = s->max_length,
                              .streaming = s->generated() > 0,
                              .draft = s->num_drafted()});
  }
  return view;
}

bool RunningSet::Grow(Sequence* s, int num_blocks) {
  if (num_blocks == 0) return true;
  absl::StatusOr<engine::BlockLease> more = pool_->Reserve(num_blocks);
  if (!more.ok()) return false;
  s->lease.Append(*std::move(more));
  return true;
}

void RunningSet::Preempt(Sequence* s) {
  CacheComputed(s);  // what is not evicted meanwhile need not be computed again
  Release(s);
  s->phase = SequencePhase::kPreempted;
  // The prompt is computed again from its beginning, logprobs and all.
  if (s->generated() == 0) s->prompt_logprobs.clear();
}

bool RunningSet::Resume(Sequence* s) {
  const int block_size = cache_->block_size();
  // At least the last token is computed: its output is the next draw. Logprobs of the prompt exist
  // only where its tokens are computed.
  const bool all = s->generated() == 0 && s->work.sampling.prompt_logprobs >= 0;
  engine::BlockLease lease =
      cache_->Match(s->hash_seed, s->tokens, all ? 0 : (s->length() - 1) / block_size);
  const int cached = lease.size();
  absl::StatusOr<engine::BlockLease> fresh =
      pool_->Reserve(BlocksFor(s->length() + 1, block_size) - cached);
  if (!fresh.ok()) return false;
  lease.Append(*std::move(fresh));
  s->lease = std::move(lease);
  s->computed = s->launched = s->proven = cached * block_size;
  s->cached_blocks = cached;
  s->phase = SequencePhase::kRunnable;
  return true;
}

void RunningSet::CacheComputed(Sequence* s) {
  // Only what collected steps computed: a launched one may still turn out to have failed. And only
  // what is proven: broken numbers show in the logits, not in the chunks before them.
  const int good = std::min(s->computed, s->proven);
  const int full = good / cache_->block_size();
  if (full <= s->cached_blocks) return;
  const auto tokens = std::span<const int32_t>(s->tokens).first(static_cast<size_t>(good));
  cache_->Insert(s->hash_seed, tokens, s->lease, s->cached_blocks);
  s->cached_blocks = full;
}

void RunningSet::Release(Sequence* s) {
  steps_->Drop(s->work.id, std::move(s->lease));
  s->computed = s->launched = s->proven = 0;
  s->cached_blocks = 0;
  s->pending = {};
}

}  // namespace tandem::decode
