// Prompts computed elsewhere: the loop's side of the Prefill calls and of the KV transfers that
// belong to them, and the quarantine of blocks that a sender might still write.
//
// Not thread-safe: part of the loop. Every event may come late, twice or in any order; what does
// not belong to a current attempt is ignored.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

#include "common/base/clock.h"
#include "decode_worker/prefill_caller.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

class RemotePrefills {
 public:
  // All outlive this. `call_timeout` bounds a call whose request has no deadline.
  RemotePrefills(kvtransfer::KvReceiver* receiver, PrefillCaller* caller, engine::BlockPool* pool,
                 Clock* clock, absl::Duration call_timeout);

  // Asks `sequence.work.prefill[sequence.next_candidate++]` under a new transfer id and the next
  // epoch. `target` takes the prompt's blocks after those that the sequence holds; `num_shipped` of
  // them are shipped, the rest is room to grow. On error the blocks are free again.
  absl::Status Begin(Sequence* sequence, engine::BlockLease target, int num_shipped);

  // The sequence that waits for this event, with its attempt updated; null: nobody does.
  Sequence* OnReply(uint64_t call_id, absl::Time now);
  Sequence* OnSealed(const TransferId& id, uint64_t epoch, const kvtransfer::TransferStats& stats,
                     absl::Time now);
  Sequence* OnFailed(const TransferId& id, uint64_t epoch);
  void OnQuiet(const TransferId& id, uint64_t epoch);

  // Replied and sealed: the blocks become the sequence's.
  void Complete(Sequence* sequence);
  // Gives the attempt up, in any state: cancels call and transfer; blocks that may still be written
  // go to quarantine. No attempt: nothing happens.
  void Abandon(Sequence* sequence);

  // Transfers that are not quiet yet.
  size_t num_transfers() const { return transfers_.size(); }

 private:
  struct Transfer {
    uint64_t epoch = 0;
    Sequence* sequence = nullptr;  // null: completed or abandoned
    bool quiet = false;
    uint64_t ticket = 0;  // of the quarantine
  };
  // Null for unknown ones and for another epoch.
  Transfer* Find(const TransferId& id, uint64_t epoch);

  kvtransfer::KvReceiver* const receiver_;
  PrefillCaller* const caller_;
  engine::BlockPool* const pool_;
  Clock* const clock_;
  const absl::Duration call_timeout_;
  uint64_t last_call_id_ = 0;
  absl::flat_hash_map<uint64_t, Sequence*> calls_;  // without a reply
  absl::flat_hash_map<TransferId, Transfer> transfers_;
};

}  // namespace tandem::decode
