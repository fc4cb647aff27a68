// Blocks that prefill workers ask back: of a prompt that they compute for this worker, and of which
// this worker holds more. They are leased until the sender is done with them, whatever becomes of
// the sequence.
//
// Not thread-safe: part of the loop. Events may come late or twice; what is not known is ignored.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

#include "common/base/transfer_id.h"
#include "common/metrics/worker_metrics.h"
#include "decode_worker/prefill_caller.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

class Returns {
 public:
  // All outlive this. Nothing may be computed any more when it goes: the sender may still read.
  // `sender` null: this worker gives nothing.
  Returns(std::string worker_id, int num_layers, kvtransfer::KvSender* sender,
          engine::PrefixCache* cache, WorkerMetrics* metrics);

  bool possible() const { return sender_ != nullptr; }
  // Sends what the prefill worker of `sequence` wants (WantedFromProto). One call has one return:
  // another is ignored.
  void Give(const Sequence& sequence, BlocksWanted wanted);
  // The call is over: nobody waits for its blocks.
  void Abort(uint64_t call_id);
  void OnGiven(const TransferId& id, uint64_t epoch, const absl::Status& status,
               const kvtransfer::TransferStats& stats);

  // As KvSender::Links.
  std::map<std::string, KvLink> Links() const;
  // Transfers whose blocks the sender may still read.
  size_t num_transfers() const { return transfers_.size(); }

 private:
  struct Transfer {
    TransferId id;
    uint64_t epoch = 0;
    std::string peer;
    engine::BlockLease lease;
  };

  const std::string worker_id_;
  const int num_layers_;
  kvtransfer::KvSender* const sender_;
  engine::PrefixCache* const cache_;
  WorkerMetrics* const metrics_;
  absl::flat_hash_map<uint64_t, Transfer> transfers_;  // by call
};

}  // namespace tandem::decode
