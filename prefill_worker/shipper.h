// Which blocks of which prompt go to the KV sender, and when.
//
// Not thread-safe: part of the loop. A block is pushed layer by layer, once: all layers at once if
// the prefix cache had it, else each layer as soon as the step that completes the block has
// computed it. A partly filled block is pushed only when it is the prompt's last.
#pragma once

#include <deque>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"

#include "common/base/kv_layout.h"
#include "engine/runtime/model_runner.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/sequence.h"

namespace tandem::prefill {

class Shipper {
 public:
  // `sender` outlives this.
  Shipper(kvtransfer::KvSender* sender, const KvLayout& layout);

  // Begins the transfer of a prompt whose first `cached` blocks are computed, and pushes those.
  absl::Status Begin(Sequence* sequence, int cached_blocks);
  // Prompt blocks up to `cached_blocks` are computed as well.
  void PushCached(Sequence* sequence, int cached_blocks);
  // The batch under construction computes the prompt up to token `end`: what it completes is to be
  // pushed with it.
  void NoteForBatch(Sequence* sequence, int end);
  // Whether anything was noted: the batch then wants an event for each layer.
  bool has_notes() const { return !shipments_.empty(); }
  // The batch was launched: what was noted is pushed, to be sent as its layers come true.
  void PushWith(const engine::LaunchedStep& step);
  // The batch was not launched.
  void DropNotes() { shipments_.clear(); }
  // The prompt is computed.
  void Finish(const Sequence& sequence);
  // Send no more of it. The sender may read its blocks until KvShipped.
  void Abort(const Sequence& sequence);

  // Whether a transfer is one of the last that were over, so that a repeated request is known.
  bool IsPast(const TransferKey& key) const { return past_.contains(key); }
  void NotePast(const TransferKey& key);

 private:
  // Blocks that one item of a batch completes.
  struct Shipment {
    TransferKey key;
    std::vector<int32_t> blocks;
    std::vector<int32_t> ordinals;
  };

  kvtransfer::KvSender* const sender_;
  const KvLayout layout_;
  std::vector<Shipment> shipments_;     // of the batch under construction
  std::deque<TransferKey> past_order_;  // oldest first
  absl::flat_hash_set<TransferKey> past_;
};

}  // namespace tandem::prefill
