// One expected transfer at the receiver: who may write its blocks, and how it ends.
//
//   EXPECTED --OPEN with the token--> OPEN --all pages, FINISH, digests equal--> SEALED
//       |                              |----digest differs, pages missing, connection lost,
//       QUIET--> |                              | FAILED
//       +---------Cancel()-------------+--> CANCELLED
// Each becomes quiet once its sender can write no more: at once after FINISH or QUIET, or if it was
// never opened; when the connection is lost, as soon as the reader knows of the writer's end.
//
// Thread-safe. Over a two-sided transport every byte is written under `mutex_`, in reads that never
// wait for the peer: that is what makes Cancel() prompt and final.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/arrival_map.h"
#include "kvtransfer/channel/kv_counter_block.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

class TransferTable;

// What all transfers of one receiver share. Outlives them.
struct ReceiverContext {
  const KvReceiverOptions* options;
  const KvStore* store;
  KvCounterBlock* counters;
  TransferTable* table;
};

// The connection that opened a transfer, with what moves its bytes.
struct BoundConnection {
  std::shared_ptr<KvConnection> connection;
  std::shared_ptr<KvReader> reader;
  const KvTransport* transport = nullptr;
};

class IncomingTransfer : public std::enable_shared_from_this<IncomingTransfer> {
 public:
  // `blocks` are valid blocks of the pool.
  IncomingTransfer(const TransferKey& key, std::vector<int32_t> blocks, std::string token,
                   std::string sender, const ReceiverContext* context);

  const TransferKey& key() const { return key_; }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  bool quiet() const;
  uint64_t bytes_arrived() const;

  // Whether the worker that has proved this id may write it.
  bool MayBeSentBy(std::string_view worker_id) const {
    return sender_.empty() || sender_ == worker_id;
  }
  // Compares in time that does not depend on where tokens differ.
  bool TokenMatches(std::string_view token) const;
  // Binds the transfer to the connection on which its token came; returns the grant to write (empty
  // unless the transport is one-sided). The same again when it is bound there already; else says
  // why this connection will not write: cancelled, over, bound elsewhere, another number of blocks.
  absl::StatusOr<std::string> Open(const BoundConnection& bound, uint32_t num_blocks);

  enum class Receipt { kTaken, kLate };
  // Has the reader take a DATA frame's payload: to the pool what is wanted. kLate: nothing of it
  // was wanted because the transfer is not open here. An error means that the connection cannot go
  // on.
  absl::StatusOr<Receipt> ReceiveData(const BoundConnection& from, const FrameHeader& header);
  // The sender's digests of some heads. kLate as above; an error if they do not fit the transfer.
  absl::StatusOr<Receipt> Finish(const KvConnection* connection, const HeadRange& heads,
                                 std::vector<uint64_t> digests);
  // The sender of `connection` writes nothing more. Ignored if the transfer is not bound there.
  void SenderQuiet(const KvConnection* connection, const absl::Status& reason);
  // The connection is dead. Ignored if the transfer is not bound there.
  void ConnectionLost(const KvConnection* connection, const absl::Status& reason);
  void Cancel();
  // The receiver closes; no connection is left, and one-sided writers had their time to detach.
  void Close();

  // What is due at `now`: abort notices, timeouts. Returns when to call again at the latest.
  absl::Time Tick(absl::Time now);

  // For a frame's reception. Runs `write` if `connection` may still write.
  bool WriteIfOpen(const KvConnection* connection, absl::FunctionRef<void()> write);
  // The wanted bytes of the frame are in the pool.
  void Arrived(const KvConnection* connection, const FrameHeader& header);

 private:
  enum class State { kExpected, kOpen, kSealed, kFailed, kCancelled };

  // What a deadline that has passed asks for.
  enum class Due { kNothing, kWriterCheck, kIncomplete, kNeverOpened, kNoAnswer };

  absl::Time Now() const { return context_->options->clock->Now(); }
  bool WritableBy(const KvConnection* connection) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return state_ == State::kOpen && !lost_ && bound_.connection.get() == connection;
  }
  // OK if the frame names pages of this transfer and its length is theirs.
  absl::Status CheckData(const FrameHeader& header) const;
  // Where the frame's pages belong; `*any_wanted` if some are not there yet.
  static HeadRange HeadsOf(const FrameHeader& header);
  std::vector<TargetPiece> PlanPieces(const FrameHeader& header, bool* any_wanted) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Digests pages that are here: of blocks from `first_ordinal` on. False: they are not wanted any
  // more.
  bool AddDigests(const KvConnection* connection, const BlockRun& run, size_t first_ordinal);
  void SealOrFail(const KvConnection* connection);

  // Ends an EXPECTED or OPEN transfer: state, callback, quiet, RESULT to the sender. Whoever comes
  // second does nothing; a CANCELLED transfer only becomes quiet. `writer_ended`: the sender is
  // known to write no more; else that is found out.
  void Settle(const absl::Status& outcome, KvFailure reason, bool writer_ended);
  void BecomeQuietOnceWriterIsGone();
  void BecomeQuiet();

  // Parts of Tick().
  void SendAbortIfDue();
  Due TakeDue(absl::Time now);
  void ShutDownConnection();

  const TransferKey key_;
  const std::vector<int32_t> blocks_;
  const std::string token_;
  const std::string sender_;  // worker id; empty: any
  const ReceiverContext* const context_;

  mutable absl::Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kExpected;
  bool quiet_ ABSL_GUARDED_BY(mutex_) = false;
  BoundConnection bound_ ABSL_GUARDED_BY(mutex_);                    // until quiet
  const KvConnection* opened_by_ ABSL_GUARDED_BY(mutex_) = nullptr;  // compared only
  std::string grant_ ABSL_GUARDED_BY(mutex_);
  bool lost_ ABSL_GUARDED_BY(mutex_) = false;    // the connection is; its writer may not be gone
  bool fenced_ ABSL_GUARDED_BY(mutex_) = false;  // and it was told that its blocks wait for that
  ArrivalMap arrival_ ABSL_GUARDED_BY(mutex_);
  TransferStats stats_ ABSL_GUARDED_BY(mutex_);
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  bool abort_due_ ABSL_GUARDED_BY(mutex_) = false;
  // The thread inside on_sealed or on_failed, which Cancel() waits for (unless it is the same one).
  std::thread::id notifying_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::kvtransfer
