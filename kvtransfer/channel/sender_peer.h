// The sending end towards one peer: a queue and one thread, which owns the link to that peer and
// all transfers to it. A peer that is slow or dead holds up nobody but itself.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/kv_link.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/outgoing_transfer.h"
#include "kvtransfer/channel/sender_link.h"
#include "kvtransfer/channel/sender_queue.h"
#include "kvtransfer/channel/transfer_key.h"

namespace tandem::kvtransfer {

// What all peers of one sender share. Outlives them.
struct SenderContext {
  LinkContext link;
  // Called once per transfer, on the peer's thread or inside Abort(), without locks.
  std::function<void(const TransferKey&, const absl::Status&, const TransferStats&)> done;
};

// Thread-safe. Open, Push, Finish and Abort only queue.
class SenderPeer {
 public:
  SenderPeer(PeerAddress peer, const SenderContext* context);
  ~SenderPeer() { Stop(); }
  // Fails what is under way with CANCELLED; no callback comes after it. Idempotent; not from a
  // callback.
  void Stop();

  void Open(KvSendTarget target);
  void Push(const TransferKey& key, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready);
  void Finish(const TransferKey& key);
  void Abort(const TransferKey& key);

  // Worker id (its address, as long as it has none) and what is known of the link to it; nothing
  // before the first connection.
  std::optional<std::pair<std::string, KvLink>> Link() const;
  // No connection, nothing queued, nothing under way: may be destroyed without loss.
  bool idle() const;

 private:
  // A run on its way.
  struct Posted {
    TransferKey key;
    int32_t ordinal_begin = 0;
    uint64_t bytes = 0;
    absl::Time start;
    std::unique_ptr<KvPost> post;
  };

  // All of these: the peer's thread.
  void Loop();
  void HandleAborts();
  // Asked while a send waits for the peer: aborts need not wait for it. False: the transfer whose
  // blocks are being sent was given up.
  bool StillWanted();
  void HandleReplies();
  absl::Status ReadReply();
  void HandleResult(const TransferKey& key, const absl::Status& status);
  void HandleOpened(const TransferKey& key, std::string grant);
  void HandlePosts();
  absl::Status Complete(Posted posted);
  void TimeOutAnswers();
  absl::Time NextDeadline() const;

  void Process(OpenItem item);
  void Process(PushItem item);
  void Process(FinishItem item);
  // False: that failed, and so has everything that wanted it.
  bool ConnectIfWanted();
  absl::Status Connect(const std::string& transports);
  // Posts what of the run was not sent before. The transfer may be over when they return.
  absl::Status SendRun(const TransferKey& key, const PushedRun& run);
  absl::Status PostRun(OutgoingTransfer* transfer, const PushedRun& run);
  // FINISH, once everything before it has been posted.
  void SendFinishIfDue(const TransferKey& key);
  // Tells the peer what nothing more comes for. Not where a transfer ends: that may be within a
  // send.
  void SendQuiets();
  // Ends the transfer once none of its posts is under way: QUIET if so wanted, then `done`, once.
  // Items of it that are still queued are dropped.
  void End(const TransferKey& key, TransferEnd end);
  void Done(const TransferKey& key, const TransferEnd& end);
  // Any thread.
  void CountDone(const TransferKey& key, const absl::Status& status,
                 std::optional<KvFailure> failure, const TransferStats& stats);
  void CloseLink();
  void LoseLink(const absl::Status& status);
  void FailAll(const absl::Status& status, KvFailure failure);
  void FailQueuedOpens(const absl::Status& status, KvFailure failure);
  void UpdateRate(const OutgoingTransfer& transfer);

  const PeerAddress peer_;
  const SenderContext* const context_;

  SenderQueue queue_;

  mutable absl::Mutex mutex_;
  std::optional<KvLink> found_ ABSL_GUARDED_BY(mutex_);  // of the last connection
  absl::Time refused_at_ ABSL_GUARDED_BY(mutex_);        // if it was
  std::string presented_id_ ABSL_GUARDED_BY(mutex_);
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;

  // The peer's thread.
  std::unique_ptr<SenderLink> link_;
  absl::flat_hash_map<TransferKey, OutgoingTransfer> transfers_;
  std::deque<Posted> posts_;
  std::optional<TransferKey> posting_;  // whose Post() runs
  std::deque<std::pair<TransferKey, absl::Status>> quiets_;

  std::thread thread_;  // last: starts when everything else is there
};

}  // namespace tandem::kvtransfer
