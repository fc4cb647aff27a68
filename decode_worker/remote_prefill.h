// Prompts computed elsewhere: the loop's side of the Prefill calls and of the KV transfers that
// belong to them, what becomes of a sequence when one of them goes wrong, and the quarantine of
// blocks that a sender might still write.
//
// Not thread-safe: part of the loop. Every event may come late, twice or in any order; what does
// not belong to a current attempt is ignored.
//
// A sequence waits (kAwaitingPrefill) until its attempt is replied to and sealed, in either order.
//   before the reply   a failure: Retry, the next candidate, another transfer, other blocks
//   after the reply    the first token is out; a failure: Lose, the prompt is computed here
// The first token may be out before the loop has read the reply (FirstToken): then a failure waits
// until it has.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

#include "common/base/clock.h"
#include "common/base/load_report.h"
#include "decode_worker/decode_metrics.h"
#include "decode_worker/event.h"
#include "decode_worker/prefill_caller.h"
#include "decode_worker/prefill_window.h"
#include "decode_worker/returns.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

struct RemotePrefillOptions {
  std::string worker_id;  // of this worker
  std::string kv_transport = "auto";
  int block_size = 16;                                 // tokens
  int num_layers = 0;                                  // of the pool
  absl::Duration call_timeout = absl::Minutes(10);     // of one Prefill call
  absl::Duration kv_seal_timeout = absl::Seconds(10);  // after the first token, without progress
  PrefillWindowOptions window;
};

class RemotePrefills {
 public:
  // All outlive this.
  RemotePrefills(RemotePrefillOptions options, kvtransfer::KvReceiver* receiver,
                 kvtransfer::KvSender* sender, PrefillCaller* caller, engine::BlockPool* pool,
                 engine::PrefixCache* cache, Clock* clock, DecodeMetrics* metrics);

  // Whether the first of `work.prefill` is to be asked for one more prompt now.
  bool MayAsk(const Work& work, int tokens, int blocks) const {
    return window_.HasRoom(work.prefill.front().worker_id, tokens, blocks);
  }
  // Asks `sequence.work.prefill[sequence.next_candidate++]` under a new transfer id and the next
  // epoch. `target` takes the prompt's blocks that the sequence does not hold, and behind them the
  // room to grow. `now`: when the sequence's time began to be this attempt's. On error the blocks
  // are free again.
  absl::Status Begin(Sequence* sequence, engine::BlockLease target, absl::Time now);

  // The sequence that waits for this event, with its attempt updated; null: nobody does.
  Sequence* OnReply(const PrefillReply& reply);
  Sequence* OnSealed(const TransferId& id, uint64_t epoch, const kvtransfer::TransferStats& stats);
  Sequence* OnFailed(const TransferId& id, uint64_t epoch, const absl::Status& status);
  void OnQuiet(const TransferId& id, uint64_t epoch);
  // The prefill worker wants blocks of the prompt back.
  void OnWanted(BlocksWanted wanted);
  void OnGiven(const KvGiven& given);
  // Whether the blocks take too long: the first token is out, and nothing of them has arrived for
  // so long. One that only waits for its share of a link is not late.
  bool SealIsLate(Sequence* sequence);

  // Takes over what the reply says, but for the first token.
  void TakeOutcome(Sequence* sequence, PrefillOutcome outcome);
  // Replied and sealed: the blocks become the sequence's, which can run.
  void Complete(Sequence* sequence);
  // No token is out yet: asks the next candidate. An error ends the sequence: INVALID_ARGUMENT
  // or INTERNAL if that is `why`; else with a Refusal, RESOURCE_EXHAUSTED if the last worker
  // was full, UNAVAILABLE if they were lost: all, or as many as may be (Work::may_lose).
  // `reached`: the worker may have had the prompt.
  absl::Status Retry(Sequence* sequence, const absl::Status& why, bool reached = true);
  // The first token is out but its KV will not come: the prompt is computed here, as after a
  // preemption.
  void Lose(Sequence* sequence, const absl::Status& why);
  // Gives the attempt up, in any state: cancels call and transfer; blocks that may still be written
  // go to quarantine. No attempt: nothing happens. `why` is what its span says.
  void Abandon(Sequence* sequence, absl::StatusCode why = absl::StatusCode::kCancelled);

  // Workers that failed since they last served a prompt.
  std::map<std::string, LoadReport::PrefillFailures> Failures() const;
  // To the workers that blocks were given back to.
  std::map<std::string, KvLink> Links() const { return returns_.Links(); }
  // Transfers that are not quiet yet, either way.
  size_t num_transfers() const { return transfers_.size() + returns_.num_transfers(); }

 private:
  struct Transfer {
    uint64_t epoch = 0;
    Sequence* sequence = nullptr;  // null: completed or abandoned
    bool quiet = false;
    uint64_t ticket = 0;  // of the quarantine
  };
  // The sequence of a call that was not answered until now, and has ended so.
  Sequence* EndCall(uint64_t call_id, absl::Time now, absl::StatusCode code);
  // Null for unknown ones and for another epoch.
  Transfer* Find(const TransferId& id, uint64_t epoch);
  PrefillCall MakeCall(const Sequence& sequence, const PrefillAttempt& attempt) const;
  struct Failed {
    int in_a_row = 0;
    absl::Time last;
  };
  void NoteFailure(const std::string& worker_id, const absl::Status& why);
  void CountFailure(const Sequence& sequence);  // of its current attempt's transfer

  const RemotePrefillOptions options_;
  kvtransfer::KvReceiver* const receiver_;
  PrefillCaller* const caller_;
  engine::BlockPool* const pool_;
  Clock* const clock_;
  DecodeMetrics* const metrics_;
  uint64_t last_call_id_ = 0;
  absl::flat_hash_map<uint64_t, Sequence*> calls_;  // without a reply
  PrefillWindow window_;                            // of these
  Returns returns_;                                 // of these
  absl::flat_hash_map<TransferId, Transfer> transfers_;
  absl::flat_hash_map<std::string, Failed> failed_;  // by worker; bounded by kMaxFailed
};

}  // namespace tandem::decode
