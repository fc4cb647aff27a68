// One request being computed, as the decode loop holds it. Not thread-safe: owned by the loop.
//
// What another worker would need to carry a sequence on is small: its tokens, the prompt's length
// and the sampling parameters (draws depend on seed and position only). All else can be rebuilt, as
// it is after a preemption.
//
// How far a sequence is, in tokens from its beginning:
//   computed <= launched <= tokens.size()  (+ 1 while a token is pending)
// Where the loop keeps one step in flight, `launched` runs ahead of `computed` by what that step
// computes. If the step draws a token, the token is *pending*: the next step may take it on the
// device, but the host does not know it, nor whether it ends the sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/token_event.h"
#include "common/base/trace.h"
#include "common/base/transfer_id.h"
#include "decode_worker/draft_policy.h"
#include "decode_worker/drafter.h"
#include "decode_worker/first_token.h"
#include "decode_worker/request.h"
#include "decode_worker/scheduler.h"
#include "decode_worker/token_stream.h"
#include "engine/kv/block_pool.h"
#include "engine/runtime/batch.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

// What speculation (speculation.h) knows of one sequence.
struct Speculated {
  std::unique_ptr<Drafter> drafter;
  DraftPolicy policy;
  Draft draft;          // for the next step
  int seen_length = 0;  // tokens that the policy knows of
  // What the token at a position was guessed to be, on which evidence, while a step drew it.
  struct Guess {
    int position = 0;
    int32_t token = 0;
    int evidence = 0;
  };
  std::optional<Guess> guess;
};

// One prompt asked of one prefill worker.
struct PrefillAttempt {
  uint64_t call_id = 0;
  TransferId transfer;
  uint64_t epoch = 0;
  PrefillPeer peer;
  engine::BlockLease target;  // being written by the peer, and the room to grow behind
  int asked_tokens = 0;       // that the peer computes, or has cached
  TraceContext trace;         // of the call
  absl::Time began_at;        // the stages of one attempt follow those of the one before
  std::shared_ptr<FirstToken> first_token;
  bool replied = false;
  bool sealed = false;
  absl::Status kv_failure;  // its KV is lost, and the reply whose token is out is on its way
  absl::Time replied_at;
  absl::Time sealed_at;
  uint64_t bytes_seen = 0;  // of its KV, at `progressed_at`
  absl::Time progressed_at = absl::InfinitePast();
  kvtransfer::TransferStats stats;  // once sealed
};

struct Sequence {
  Work work;  // work.tokens was moved to `tokens`
  std::shared_ptr<TokenStream> stream;
  std::unique_ptr<RequestTrace> trace;  // null: it has no spans

  std::vector<int32_t> tokens;  // prompt, then generated; the pending one is not among them
  int prompt_length = 0;
  int arrived_length = 0;  // tokens it came with: the prompt, and what was generated elsewhere
  int max_length = 0;      // in tokens: it ends there, whatever it draws
  Hash128 hash_seed;

  SequencePhase phase = SequencePhase::kRunnable;
  bool closed = false;         // its stream has ended; it is swept out at the end of the step
  int computed = 0;            // tokens whose KV lies in `lease`, as collected steps say
  int launched = 0;            // the same, with what launched steps compute
  int proven = 0;              // of `computed`: a token was drawn from sound logits behind them
  engine::DrawnToken pending;  // step 0: none
  std::unique_ptr<Speculated> speculated;  // null: nothing was drafted yet
  DraftCounts drafts;                      // that its reader does not know of
  int cached_blocks = 0;                   // of `lease`, known to the prefix cache
  engine::BlockLease lease;
  std::unique_ptr<PrefillAttempt> attempt;  // kAwaitingPrefill only
  size_t next_candidate = 0;                // of work.prefill
  uint32_t lost_prefills = 0;               // bit i: work.prefill[i] died or failed with the prompt

  int cached_tokens = 0;
  std::vector<TokenLogprob> prompt_logprobs;  // until the first token is out
  Timing timing;
  absl::Time reserved_at;
  absl::Time prefill_started_at = absl::InfiniteFuture();  // of a local prefill
  absl::Time runnable_at;                                  // first decode step could begin
  absl::Time first_token_at;
  absl::Time last_token_at;
  absl::Time preempted_at = absl::InfiniteFuture();  // since its last token; future: it was not
  absl::Time paused_at = absl::InfiniteFuture();     // its reader is slow since; future: it is not

  int length() const { return static_cast<int>(tokens.size()); }
  int generated() const { return length() - prompt_length; }
  int drawn() const { return length() - arrived_length; }  // by this worker
  bool paused() const { return paused_at != absl::InfiniteFuture(); }
  bool token_pending() const { return pending.step != 0; }
  int num_drafted() const {
    return speculated != nullptr ? static_cast<int>(speculated->draft.tokens.size()) : 0;
  }
};

}  // namespace tandem::decode
