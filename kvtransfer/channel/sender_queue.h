// What a worker wants of one peer, in order, and how the peer's thread waits for it: the border
// between the threads that push and the one that sends.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
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

  void Push(SendItem item);
  // Beside the FIFO, so that it overtakes what waits there.
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
  // The next item; nothing, after a moment, if its blocks are not ready yet. Layers that follow it
  // with the same blocks, and are ready, are joined with it.
  std::optional<SendItem> TakeItem();
  std::deque<TransferKey> TakeAborts();
  // The target of `key` if its OpenItem is still queued.
  std::optional<KvSendTarget> TakeOpen(const TransferKey& key);
  // The targets of all OpenItems; everything else is dropped too.
  std::vector<KvSendTarget> TakeAllOpens();

 private:
  void Wake() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void JoinLayers(PushItem* push) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t layer_bytes_;
  const size_t frame_bytes_;
  mutable absl::Mutex mutex_;
  std::deque<SendItem> items_ ABSL_GUARDED_BY(mutex_);
  std::deque<TransferKey> aborts_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<KvConnection> connection_ ABSL_GUARDED_BY(mutex_);
  bool sleeping_ ABSL_GUARDED_BY(mutex_) = false;  // on the connection
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem::kvtransfer
