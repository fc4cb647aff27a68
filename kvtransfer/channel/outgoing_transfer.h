// One transfer at the sender: what was sent of which block, and its digests.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/ready_event.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// Consecutive ordinals of consecutive layers: becomes one DATA frame.
struct PushedRun {
  int layer_begin = 0;
  int layer_count = 1;
  int32_t ordinal_begin = 0;
  std::vector<int32_t> source_blocks;
};

// How a transfer ends.
struct TransferEnd {
  absl::Status status;
  std::optional<KvFailure> failure;
  bool tell_quiet = false;
};

// Not thread-safe: of its peer's thread.
struct OutgoingTransfer {
  // `num_layers` and `heads` are what the receiver holds; they are not known before there is a
  // connection, and not needed for a transfer that ends without one.
  explicit OutgoingTransfer(KvSendTarget target) : target(std::move(target)) {}
  void Begin(int num_layers, const HeadRange& heads_of_peer, std::string transport);

  TransferKey key() const { return {target.id, target.epoch}; }
  // OK if the run names layers and ordinals of this transfer and blocks of `source`.
  absl::Status Check(const PushedRun& run, const KvPoolShape& source) const;
  // True if some block of some layer of the run was sent before.
  bool AnySent(const PushedRun& run) const;
  void MarkSent(const PushedRun& run);
  // The digests of a run that was marked sent, one per block.
  void AddDigests(int32_t ordinal_begin, std::span<const uint64_t> run_digests);
  // The payload of FINISH.
  std::string DigestPayload() const;

  KvSendTarget target;
  HeadRange heads;       // what is sent of every block
  bool granted = false;  // may be written: at once, or when a one-sided peer said so
  std::string grant;
  bool finish_wanted = false;      // the worker called Finish
  bool finished = false;           // FINISH is out
  int posts = 0;                   // under way
  std::optional<TransferEnd> end;  // to come true once no post is under way
  std::vector<bool> sent;          // [layer][ordinal]
  size_t missing = 0;              // pieces that were never pushed
  std::vector<uint64_t> digests;   // by ordinal
  std::deque<PushedRun> parked;    // until granted
  absl::Time finished_at;
  absl::Duration busy;                                  // posts under way
  absl::Time answer_deadline = absl::InfiniteFuture();  // for OPENED or RESULT
  TransferStats stats;

 private:
  size_t Bit(int layer, int32_t ordinal) const {
    return static_cast<size_t>(layer) * target.target_blocks.size() + static_cast<size_t>(ordinal);
  }
};

}  // namespace tandem::kvtransfer
