#include "decode_worker/admission.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/refusal.h"
#include "common/base/status.h"

namespace tandem::decode {
namespace {

// Of the pool, that may wait for senders before no prompt more is asked for: the rest is for what
// is computed here, whatever becomes of those senders.
constexpr double kMaxQuarantined = 0.5;

}  // namespace

Admission::Admission(AdmissionOptions options, engine::BlockPool* pool, engine::PrefixCache* cache,
                     Clock* clock)
    : options_(std::move(options)), pool_(pool), cache_(cache), clock_(clock) {}

Placement Admission::Place(const Work& work) const {
  const int length = static_cast<int>(work.tokens.size());
  TANDEM_CHECK(length > 0 && length < options_.max_model_len,
               "a prompt of {} tokens came in where max_model_len is {}", length,
               options_.max_model_len);
  const int block_size = options_.limits.block_size;
  const int prompt_length = work.prompt_length > 0 ? work.prompt_length : length;
  Placement place;
  place.seed = BlockHashSeed(options_.cluster_secret, options_.model_digest, work.cache_salt);
  // In 64 bits: max_tokens may be anything up to 2^30.
  place.max_length = static_cast<int>(
      std::min<int64_t>(options_.max_model_len, int64_t{prompt_length} + work.sampling.max_tokens));
  // The last token is always computed, for its output is the first draw.
  place.cached_blocks =
      cache_->CountMatch(place.seed, work.tokens, (length - 1) / block_size, &place.idle_blocks);
  place.ask = !options_.unified && !work.prefill.empty() &&
              length - place.cached_blocks * block_size > options_.local_prefill_max_tokens;
  // Logprobs of the prompt exist only where its tokens are computed, so what is cached here does
  // not help. A prefill worker sees to that itself, and need not ship what is cached here.
  if (!place.ask && work.sampling.prompt_logprobs >= 0) place.cached_blocks = place.idle_blocks = 0;
  place.tokens = length - place.cached_blocks * block_size;
  place.needed_blocks = BlocksFor(length + 1, block_size) - place.cached_blocks;
  if (place.ask && place.max_length == length + 1) {
    // It ends with the token that the prefill worker draws, so it needs no KV here.
    place.cached_blocks = place.idle_blocks = place.needed_blocks = 0;
  }
  return place;
}

bool Admission::MayAsk(const View& view) const {
  const engine::BlockPoolCounts counts = pool_->counts();
  // What waits for a step in flight is back in a moment.
  const int quarantined = counts.quarantined - view.returning_blocks;
  return options_.unified || quarantined <= kMaxQuarantined * counts.total;
}

int Admission::MostLocalBlocks() const {
  return BlocksFor(options_.local_prefill_max_tokens + 1, options_.limits.block_size);
}

int Admission::RoomFor(const View& view, const Promised& promised) const {
  if (static_cast<int>(view.sequences.size()) + promised.sequences >=
      options_.limits.max_num_seqs) {
    return 0;
  }
  const int blocks = decode::AdmissibleBlocks(view, pool_->counts().total, options_.limits);
  return std::max(0, blocks - promised.blocks);
}

int Admission::AdmissibleBlocks(const View& view, const Promised& promised) const {
  const int blocks = RoomFor(view, promised);
  return MayAsk(view) ? blocks : std::min(blocks, MostLocalBlocks());
}

absl::Status Admission::CheckRoom(const View& view, const Placement& place,
                                  const Promised& promised) const {
  const int total = pool_->counts().total;
  const int available = RoomFor(view, promised);
  const int needed = std::max(place.needed_blocks, 1) + place.idle_blocks;
  if (place.ask && !MayAsk(view)) {
    return WithRefusal(
        ResourceExhausted("worker {}: {} of {} KV blocks wait for senders that may still write",
                          options_.worker_id, pool_->counts().quarantined, total),
        {Refusal::Reason::kBlocks, std::max(needed, MostLocalBlocks() + 1),
         std::min(available, MostLocalBlocks())});
  }
  if (needed <= available) return absl::OkStatus();
  if (static_cast<int>(view.sequences.size()) + promised.sequences >=
      options_.limits.max_num_seqs) {
    return WithRefusal(ResourceExhausted("worker {} already runs max_num_seqs = {} sequences",
                                         options_.worker_id, options_.limits.max_num_seqs),
                       {Refusal::Reason::kSequences, needed, available});
  }
  return WithRefusal(
      ResourceExhausted("worker {} has no {} KV blocks free ({} of {}, {} for newcomers)",
                        options_.worker_id, needed, pool_->NumAvailable(), total, available),
      {Refusal::Reason::kBlocks, needed, available});
}

absl::StatusOr<Admitted> Admission::Admit(Work work, const Placement& place) {
  const int length = static_cast<int>(work.tokens.size());
  Admitted out;
  out.ask = place.ask;
  out.sequence = std::make_unique<Sequence>();
  Sequence& s = *out.sequence;
  s.lease = cache_->Match(place.seed, work.tokens, place.cached_blocks);
  TANDEM_ASSIGN_OR_RETURN(out.fresh, pool_->Reserve(place.needed_blocks));
  s.tokens = std::move(work.tokens);
  s.work = std::move(work);
  s.prompt_length = s.work.prompt_length > 0 ? s.work.prompt_length : length;
  s.arrived_length = length;
  s.max_length = place.max_length;
  s.hash_seed = place.seed;
  s.cached_blocks = s.lease.size();
  s.cached_tokens = s.cached_blocks * options_.limits.block_size;
  s.computed = s.launched = s.proven = s.cached_tokens;
  s.reserved_at = clock_->Now();
  s.timing.stages[Stage::kQueue] = absl::ToDoubleMilliseconds(s.reserved_at - s.work.arrived);
  return out;
}

}  // namespace tandem::decode
