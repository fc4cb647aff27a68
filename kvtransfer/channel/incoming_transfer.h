// One expected transfer at the receiver: who may write its blocks, what has arrived, how it ends.
//
//   EXPECTED --OPEN with the token--> OPEN --all pieces, FINISH, digests equal--> SEALED
//       |                              |----digest differs, pieces missing, channel lost, QUIET-->
//       FAILED
//       +---------Cancel()-------------+--> CANCELLED
// SEALED and FAILED are quiet at once; CANCELLED when the sender says so, its channel is dead, or
// nobody opened it in time.
//
// Thread-safe. Every byte written to the pool is written under `mutex_`, in reads that never wait
// for the peer: that is what makes Cancel() prompt and final.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

class TransferTable;

// What all transfers of one receiver share. Outlives them.
struct ReceiverContext {
  const KvReceiverOptions* options;
  KvCounterBlock* counters;
  TransferTable* table;
  std::string transport;
};

class IncomingTransfer {
 public:
  // `blocks` are valid blocks of the region.
  IncomingTransfer(const TransferKey& key, std::vector<int32_t> blocks, std::string token,
                   const ReceiverContext* context);

  const TransferKey& key() const { return key_; }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  bool quiet() const;

  // Compares in time that does not depend on where tokens differ.
  bool TokenMatches(std::string_view token) const;
  // Binds the transfer to the connection on which its token came. OK also when it is bound there
  // already; else says why this connection will not write: cancelled, over, bound elsewhere,
  // another number of blocks.
  absl::Status Open(const std::shared_ptr<KvConnection>& connection, uint32_t num_blocks);

  enum class Receipt { kTaken, kLate };
  // Takes a DATA frame's payload from `connection`: to the pool what is wanted, the rest to
  // `scratch`. kLate: nothing of it was wanted because the transfer is not open here. An error
  // means that the connection cannot go on.
  absl::StatusOr<Receipt> ReceiveData(KvConnection* connection, const FrameHeader& header,
                                      MutableBytes scratch);
  // The sender's digests. kLate as above; an error if their number is wrong.
  absl::StatusOr<Receipt> Finish(KvConnection* connection, std::vector<uint64_t> digests);
  // The sender of `connection` writes nothing more. Ignored if the transfer is not bound there.
  void SenderQuiet(KvConnection* connection, const absl::Status& reason);
  // The connection is dead. Ignored if the transfer is not bound there.
  void ConnectionLost(KvConnection* connection, const absl::Status& reason);
  void Cancel();
  // The receiver closes; no connection is left.
  void Close();

  // What is due at `now`: abort notices, timeouts. Returns when to call again at the latest.
  absl::Time Tick(absl::Time now);

 private:
  enum class State { kExpected, kOpen, kSealed, kFailed, kCancelled };
  // A part of a frame's payload; no target: to scratch.
  struct Segment {
    std::byte* target = nullptr;
    size_t bytes = 0;
  };

  bool WritableBy(const KvConnection* connection) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return state_ == State::kOpen && connection_.get() == connection;
  }
  size_t Bit(uint32_t layer, uint32_t ordinal) const { return layer * blocks_.size() + ordinal; }
  std::byte* Target(uint32_t layer, uint32_t ordinal) const;
  absl::Status CheckDataHeader(const FrameHeader& header) const;
  std::vector<Segment> PlanSegments(const FrameHeader& header, bool* wanted) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status ReceiveSegments(KvConnection* connection, std::vector<Segment> segments,
                               MutableBytes scratch);
  void CountArrived(KvConnection* connection, const FrameHeader& header);
  bool CompleteLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return finished_ && missing_ == 0;
  }
  void SealOrFail(KvConnection* connection);

  // Ends an EXPECTED or OPEN transfer: state, callback, RESULT to the sender, quiet. Whoever comes
  // second does nothing; a CANCELLED transfer only becomes quiet.
  void Settle(const absl::Status& outcome, KvFailure reason);
  void BecomeQuiet();

  const TransferKey key_;
  const std::vector<int32_t> blocks_;
  const std::string token_;
  const ReceiverContext* const context_;

  mutable absl::Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kExpected;
  bool quiet_ ABSL_GUARDED_BY(mutex_) = false;
  std::shared_ptr<KvConnection> connection_ ABSL_GUARDED_BY(mutex_);  // until quiet
  const KvConnection* bound_ ABSL_GUARDED_BY(mutex_) = nullptr;  // who opened it; compared only
  bool expired_ ABSL_GUARDED_BY(mutex_) = false;       // no sender came in time; none may come now
  std::vector<bool> arrived_ ABSL_GUARDED_BY(mutex_);  // [layer][ordinal]
  size_t missing_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint64_t> digests_ ABSL_GUARDED_BY(mutex_);           // of the bytes in the pool
  std::vector<uint64_t> expected_digests_ ABSL_GUARDED_BY(mutex_);  // the sender's
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;                   // FINISH is in
  TransferStats stats_ ABSL_GUARDED_BY(mutex_);
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  bool abort_due_ ABSL_GUARDED_BY(mutex_) = false;
  // The thread inside on_sealed or on_failed, which Cancel() waits for (unless it is the same one).
  std::thread::id notifying_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::kvtransfer
