// Blocks that come back: of a prompt whose decode worker holds more of it than the prefix cache
// here does, mostly the answer of the turn before. The decode worker is asked for them over the
// call that it waits for, and ships them into the prompt's lease as blocks are shipped to it; the
// prompt is computed from there on. Whatever goes wrong, it is computed without them.
//
// Not thread-safe: part of the loop. Every event may come late, twice or in any order; what belongs
// to no return under way is ignored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "engine/kv/block_pool.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/prefill_metrics.h"
#include "prefill_worker/sequence.h"

namespace tandem::prefill {

struct ReturnOptions {
  std::string worker_id;  // of this worker
  std::string kv_transport = "auto";
  int block_size = 16;                        // tokens
  absl::Duration timeout = absl::Seconds(2);  // without progress, until they are computed instead
};

class Returns {
 public:
  // All outlive this. `receiver` null: nothing is ever asked for.
  Returns(ReturnOptions options, kvtransfer::KvReceiver* receiver, engine::BlockPool* pool,
          Clock* clock, PrefillMetrics* metrics);

  // Asks for what the caller holds beyond the first `cached` blocks of the prompt's lease, which is
  // whole. False: there is nothing to ask for, or it was tried, or the caller has not kept its word
  // lately.
  bool Begin(Sequence* sequence, int cached);

  // The prompt whose blocks are all there, and sound: its return is over, and in `*blocks` is how
  // many of its first blocks are filled. Null: nobody waits for these.
  Sequence* OnSealed(const TransferId& id, uint64_t epoch, const kvtransfer::TransferStats& stats,
                     int* blocks);
  // The prompt whose blocks will not come, to be abandoned. Null: nobody waits for them.
  Sequence* OnFailed(const TransferId& id, uint64_t epoch) const;
  void OnQuiet(const TransferId& id, uint64_t epoch);
  // The prompts of whose blocks nothing has arrived for too long.
  std::vector<Sequence*> Late();
  // Gives a return up. The lease keeps what lies before it; blocks that may still be written go to
  // quarantine.
  void Abandon(Sequence* sequence, ReturnResult why);

  const std::vector<Sequence*>& waiting() const { return waiting_; }
  // Transfers that are not quiet yet.
  size_t num_transfers() const { return transfers_.size(); }

  static ReturnResult ResultOf(const absl::Status& failure);

 private:
  struct Transfer {
    Sequence* sequence = nullptr;  // null: over, but not quiet
    uint64_t ticket = 0;           // of the quarantine
  };
  struct Distrust {
    int in_a_row = 0;
    absl::Time until;
  };

  bool Trusts(const std::string& peer) const;
  // The return leaves its sequence; its time counts.
  void End(Sequence* sequence, ReturnResult result);

  const ReturnOptions options_;
  kvtransfer::KvReceiver* const receiver_;
  engine::BlockPool* const pool_;
  Clock* const clock_;
  PrefillMetrics* const metrics_;
  absl::flat_hash_map<TransferKey, Transfer> transfers_;
  std::vector<Sequence*> waiting_;
  absl::flat_hash_map<std::string, Distrust> distrusted_;  // by worker; bounded
};

}  // namespace tandem::prefill
