// The sending end of the channel to one peer: a FIFO, a writer thread that owns all transfers to
// that peer, and, while a connection is up, a reader thread that turns what the peer says into
// events for the writer. A peer that is slow or dead holds up nobody but itself.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/outgoing_transfer.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

// What all peers of one sender share. Outlives them.
struct SenderContext {
  const KvSenderOptions* options;
  KvTransport* transport;
  KvCounterBlock* counters;
  // Called once per transfer, on the writer's thread, without locks.
  std::function<void(const TransferKey&, const absl::Status&, const TransferStats&)> done;
};

// Thread-safe. Open, Push, Finish and Abort only queue.
class SenderPeer {
 public:
  SenderPeer(std::string address, std::string worker_id, const SenderContext* context);
  ~SenderPeer() { Stop(); }
  // Fails what is under way with CANCELLED; no callback comes after it. Idempotent; not from a
  // callback.
  void Stop();

  void Open(KvSendTarget target);
  void Push(const TransferKey& key, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals);
  void Finish(const TransferKey& key);
  void Abort(const TransferKey& key);

  // Worker id (its address, as long as it has none) and bytes per second; nothing before the first
  // connection.
  std::optional<std::pair<std::string, double>> LinkRate() const;
  // No connection, nothing queued, nothing under way: may be destroyed without loss.
  bool idle() const;

 private:
  struct OpenItem {
    KvSendTarget target;
  };
  struct PushItem {
    TransferKey key;
    PushedRun run;
  };
  struct FinishItem {
    TransferKey key;
  };
  using Item = std::variant<OpenItem, PushItem, FinishItem>;

  // Handled before queued items.
  struct AbortEvent {  // the worker gave up
    TransferKey key;
  };
  struct PeerEvent {  // RESULT or ABORT
    FrameType type;
    TransferKey key;
    absl::Status status;
  };
  struct LostEvent {  // the reader of connection `generation` ended
    uint64_t generation;
    absl::Status status;
  };
  using Event = std::variant<AbortEvent, PeerEvent, LostEvent>;

  void WriterLoop();
  void ReaderLoop(std::shared_ptr<KvConnection> connection, uint64_t generation);
  absl::Status ReadReply(KvConnection* connection);

  // All of these: writer thread.
  void Handle(const AbortEvent& event);
  void Handle(const PeerEvent& event);
  void Handle(const LostEvent& event);
  void Process(OpenItem item);
  void Process(PushItem item);
  void Process(FinishItem item);
  absl::Status EnsureConnected();
  absl::Status Handshake(KvConnection* connection);
  absl::Status SendRun(OutgoingTransfer* transfer, const PushedRun& run);
  void TimeOutAnswers();
  absl::Time NextDeadline() const;
  // Tells the peer that nothing more comes for `key`.
  void SendQuiet(const TransferKey& key, const absl::Status& why);
  // Ends the transfer: `done`, once. Items of it that are still queued are skipped later.
  void Done(const TransferKey& key, const absl::Status& status, std::optional<KvFailure> failure);
  void CloseConnection();
  void LoseConnection(absl::Status status);
  void FailAll(const absl::Status& status, KvFailure failure);
  void FailQueuedOpens(const absl::Status& status, KvFailure failure);
  void UpdateRate(const OutgoingTransfer& transfer);

  const std::string address_;
  const std::string worker_id_;  // may be empty
  const SenderContext* const context_;

  mutable absl::Mutex mutex_;
  std::deque<Item> queue_ ABSL_GUARDED_BY(mutex_);
  std::deque<Event> events_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<KvConnection> connection_ ABSL_GUARDED_BY(mutex_);  // set by the writer
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  double rate_ ABSL_GUARDED_BY(mutex_) = 0;  // bytes per second; 0: not known
  std::string presented_id_ ABSL_GUARDED_BY(mutex_);
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;

  // Writer thread.
  absl::flat_hash_map<TransferKey, OutgoingTransfer> transfers_;
  std::shared_ptr<KvConnection> wire_;  // == connection_
  uint64_t generation_ = 0;
  int peer_num_blocks_ = 0;
  std::thread reader_;

  std::thread writer_;  // last: starts when everything else is there
};

}  // namespace tandem::kvtransfer
