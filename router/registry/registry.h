// Who is in the cluster: workers join, report, drain and leave; readers take an immutable view.
//
// Thread-safe. The listener is called after every change, without the lock held, possibly from
// several threads at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/cluster_view.h"

namespace tandem::internal::v1 {
class Capability;
}  // namespace tandem::internal::v1

namespace tandem::router {

// What the router itself knows, from its model directory and its flags; workers must agree. What is
// empty or 0 is not compared: then the first worker says it for the others.
struct RegistryOptions {
  std::string model;             // served name
  std::string model_digest;      // common/base/model_digest.h
  std::string tokenizer_digest;  // also not compared with a worker that has no tokenizer
  std::string dtype;
  std::string kv_dtype;
  std::string quantization;
  uint32_t block_size = 0;  // tokens
  uint32_t protocol_version = 0;
  uint32_t vocab_size = 0;
  uint32_t num_layers = 0;
  uint32_t num_kv_heads = 0;
  uint32_t head_dim = 0;
  int max_model_len = 0;  // tokens; not demanded of workers, but who holds less is remarked on
};

class Registry {
 public:
  // Names one stay of one worker; never used again.
  using Member = PrefixIndex::Slot;

  // `index` and `clock` outlive this.
  Registry(RegistryOptions options, PrefixIndex* index, Clock* clock);
  ~Registry();

  // At most once, before the first Join.
  void SetListener(std::function<void()> listener) { listener_ = std::move(listener); }

  // What the router does not know (RegistryOptions) the first worker says for the others, until all
  // have left. FAILED_PRECONDITION: one line that says what differs and what to make the same;
  // ALREADY_EXISTS: another live process has this id. A reconnect of the same process takes its old
  // membership's place. `on_drain` is called when an operator asks the worker to leave, from any
  // thread.
  absl::StatusOr<Member> Join(WorkerIdentity identity, const internal::v1::Capability& capability,
                              std::function<void()> on_drain);
  // Of a prefill worker: what this router vouches to it with (common/auth/voucher.h).
  std::string VouchKey(const std::string& worker_id) const;
  // Also after being replaced: then it does nothing.
  void Leave(Member member);
  void Report(Member member, LoadReport load);
  // It works on something, which has got nowhere for so long.
  void Heartbeat(Member member, absl::Duration without_progress);
  // The worker said that it takes no more.
  void MarkDraining(Member member);
  // An operator's wish: no new requests for the worker from now on, and the worker is told, once.
  // NOT_FOUND lists who is there.
  absl::Status Drain(const std::string& worker_id);

  // Never null. Made anew by the first caller after a change: reports come far more often than
  // anybody looks.
  std::shared_ptr<const ClusterView> view() const;
  // Another number after every Join, Leave and drain: not after a report.
  uint64_t roster() const { return roster_; }

 private:
  struct Entry {
    WorkerView view;
    std::function<void()> on_drain;
  };

  absl::Status CheckCapability(const internal::v1::Capability& capability)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TakeCapability(const std::string& worker_id, const internal::v1::Capability& capability)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::shared_ptr<const ClusterView> MakeView() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Entry* FindMember(Member member) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Notify() const {
    if (listener_) listener_();
  }

  const RegistryOptions options_;
  PrefixIndex* const index_;
  Clock* const clock_;
  const std::string vouch_root_;
  std::function<void()> listener_;
  mutable absl::Mutex mutex_;
  std::map<std::string, Entry> workers_ ABSL_GUARDED_BY(mutex_);  // by id
  absl::flat_hash_map<Member, Entry*> members_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<internal::v1::Capability> capability_ ABSL_GUARDED_BY(mutex_);
  mutable std::shared_ptr<const ClusterView> view_ ABSL_GUARDED_BY(mutex_);  // null: has changed
  std::atomic<uint64_t> roster_ = 0;
};

}  // namespace tandem::router
