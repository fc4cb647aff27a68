// KV shipments between workers of one process: KvSender and KvReceiver over plain memory.
//
// Keeps the contract of kvtransfer/channel/kv_endpoints.h that loops can see: tokens are compared,
// blocks are written by ordinal, a transfer is sealed when every layer of every block was pushed,
// nothing is written after Cancel or Abort, and every callback comes once. Bytes move inside Push
// and Finish, once they are ready, on the caller's thread, so a test that steps its workers by hand
// is deterministic.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/kv_layout.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem {

// Thread-safe. Outlives the endpoints that it made.
class InProcessKvNetwork {
 public:
  InProcessKvNetwork() = default;
  virtual ~InProcessKvNetwork() = default;
  InProcessKvNetwork(const InProcessKvNetwork&) = delete;

  // What workers call it: a name of --kv-transport.
  virtual std::string transport() const { return "memory"; }
  // `options.on_*` are called without locks held, as kvtransfer calls them.
  virtual std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(
      kvtransfer::KvReceiverOptions options);
  virtual std::unique_ptr<kvtransfer::KvSender> MakeSender(kvtransfer::KvSenderOptions options);

 private:
  class Receiver;
  class Sender;

  absl::Mutex mutex_;
  int last_port_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_map<std::string, Receiver*> receivers_ ABSL_GUARDED_BY(mutex_);  // by address
};

// The channel of kvtransfer itself, over loopback: what crosses it takes time, on other threads.
class LoopbackKvNetwork final : public InProcessKvNetwork {
 public:
  explicit LoopbackKvNetwork(std::string transport) : transport_(std::move(transport)) {}

  std::string transport() const override { return transport_; }
  std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(
      kvtransfer::KvReceiverOptions options) override;
  std::unique_ptr<kvtransfer::KvSender> MakeSender(kvtransfer::KvSenderOptions options) override;

 private:
  const std::string transport_;
};

}  // namespace tandem
