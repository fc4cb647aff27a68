// What a worker wants of one peer, and how the peer's thread waits for it: the border between the
// threads that push and the one that sends.
//
// Each transfer has a queue of its own, and they take turns by deficit round robin (Shreedhar and
// Varghese, 1995) with a frame as quantum: a small transfer does not wait for a large one, and of a
// link that is full each gets the same share of bytes. Blocks that are not computed yet hold up no
// other transfer's.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/ready_event.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/outgoing_transfer.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

struct OpenItem {
  KvSendTarget target;
};
struct PushItem {
  TransferKey key;
  PushedRun run;
  std::shared_ptr<const ReadyEvent> ready;  // nullptr: already
};
struct FinishItem {
  TransferKey key;
};
using SendItem = std::variant<OpenItem, PushItem, FinishItem>;

// Thread-safe. Wait() and Take*() belong to the peer's thread.
class SenderQueue {
 public:
  // `layer_bytes`: of one block of one layer; layers are joined up to `frame_bytes`.
  SenderQueue(size_t layer_bytes, size_t frame_bytes)
      : layer_bytes_(layer_bytes), frame_bytes_(frame_bytes) {}

  // What a transport wants that is known now.
  void SetFrameBytes(size_t frame_bytes);
  size_t frame_bytes() const;

  void Push(SendItem item);
  // Beside the queues, so that it overtakes what waits there.
  void PushAbort(const TransferKey& key);
  // Ends Wait() for good, and shuts the connection down.
  void Stop();
  bool stopping() const;
  bool empty() const;

  // The connection that Stop() shuts down; nullptr: none. Returns false, and keeps none, after
  // Stop().
  bool SetConnection(std::shared_ptr<KvConnection> connection);
  bool connected() const;

  // Sleeps until there is something to do: an abort, a reply to read on the connection, an item (if
  // `items_wanted`), an interrupt of the connection, Stop(), or `deadline`.
  void Wait(bool items_wanted, absl::Time deadline);
  // The next item of the transfer whose turn it is; nothing, after a moment, if no transfer's next
  // blocks are ready yet. Layers that follow it with the same blocks, and are ready, are joined
  // with it. OpenItems stay unless `may_open`: there is a connection.
  std::optional<SendItem> TakeItem(bool may_open);
  std::deque<TransferKey> TakeAborts();
  // The target of `key` if its OpenItem is still queued; the rest of it is dropped then.
  std::optional<KvSendTarget> TakeOpen(const TransferKey& key);
  // Forgets what is queued of a transfer that is over.
  void Drop(const TransferKey& key);
  // What the next transfer that is to be opened may use; nothing if there is none.
  std::optional<std::string> NextTransports() const;
  // The targets of all OpenItems; everything else is dropped too.
  std::vector<KvSendTarget> TakeAllOpens();

 private:
  // What is queued of one transfer, oldest first; never empty.
  struct Lane {
    std::deque<SendItem> items;
    int64_t credit = 0;  // bytes that it may send before the next lane's turn
  };

  void Wake() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropLane(const TransferKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the first item of the lane whose turn it is.
  SendItem TakeFirst() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes from `items` what joins `push`.
  void JoinLayers(PushItem* push, std::deque<SendItem>* items) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void NextTurn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t layer_bytes_;
  mutable absl::Mutex mutex_;
  size_t frame_bytes_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<TransferKey, Lane> lanes_ ABSL_GUARDED_BY(mutex_);
  std::deque<TransferKey> turns_ ABSL_GUARDED_BY(mutex_);  // of the lanes; the first one's is now
  std::deque<TransferKey> aborts_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<KvConnection> connection_ ABSL_GUARDED_BY(mutex_);
  bool sleeping_ ABSL_GUARDED_BY(mutex_) = false;  // on the connection
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem::kvtransfer
