// A change drops the published ClusterView, and who asks next makes a new one: a thousand workers
// that report ten times a second cost a thousandth of a view each, and the lock is held for a
// moment only. Readers that took the old view keep a consistent picture for as long as they need
// it. The prefix index is told of what left after the lock is given back, because that takes long.
// The listener runs after the lock is given back, because it calls into the dispatcher and the
// server, whose locks come before this one elsewhere.
#include "router/registry/registry.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/auth/proof.h"
#include "common/auth/voucher.h"
#include "common/base/status.h"
#include "common/rpc/cluster_client.h"

namespace tandem::router {
namespace {

using internal::v1::Capability;

int64_t KvBytesPerToken(const Capability& c) {
  const int64_t element = c.kv_dtype() == "float32" ? 4 : c.kv_dtype() == "fp8" ? 1 : 2;
  return int64_t{2} * c.num_layers() * c.num_kv_heads() * c.head_dim() * element;
}

std::string CapabilityLine(const Capability& c) {
  return fmt::format(
      "{} {}, {}kv {}, {} layers, {} kv heads of {}, block size {}, layout {}, tp {}", c.model(),
      c.dtype(), c.quantization().empty() ? "" : fmt::format("weights {}, ", c.quantization()),
      c.kv_dtype(), c.num_layers(), c.num_kv_heads(), c.head_dim(), c.block_size(), c.layout(),
      c.tensor_parallel_size());
}

}  // namespace

Registry::Registry(RegistryOptions options, PrefixIndex* index, Clock* clock)
    : options_(std::move(options)), index_(index), clock_(clock), vouch_root_(MakeNonce()) {}

Registry::~Registry() = default;

absl::Status Registry::CheckCapability(const Capability& got) {
  // The router compares only what it knows: it starts from what came and overwrites that, so that
  // everything else counts as equal.
  Capability own = got;
  own.set_model(options_.model);
  if (!options_.model_digest.empty()) own.set_model_digest(options_.model_digest);
  if (!options_.dtype.empty()) own.set_dtype(options_.dtype);
  if (!options_.kv_dtype.empty()) own.set_kv_dtype(options_.kv_dtype);
  if (!options_.quantization.empty()) own.set_quantization(options_.quantization);
  if (options_.block_size != 0) own.set_block_size(options_.block_size);
  if (options_.protocol_version != 0) own.set_protocol_version(options_.protocol_version);
  if (options_.vocab_size != 0) own.set_vocab_size(options_.vocab_size);
  if (options_.num_layers != 0) own.set_num_layers(options_.num_layers);
  if (options_.num_kv_heads != 0) own.set_num_kv_heads(options_.num_kv_heads);
  if (options_.head_dim != 0) own.set_head_dim(options_.head_dim);
  if (!options_.tokenizer_digest.empty() && !got.tokenizer_digest().empty()) {
    own.set_tokenizer_digest(options_.tokenizer_digest);
  }
  if (const std::string line = DescribeDifference(own, got); !line.empty()) {
    return FailedPrecondition("the worker does not fit the cluster: {}; {}", line,
                              DifferenceRemedy(own, got));
  }
  if (capability_ != nullptr) {
    if (const std::string line = DescribeDifference(*capability_, got); !line.empty()) {
      return FailedPrecondition(
          "the worker does not fit the cluster, which is as its first worker: {}; {}", line,
          DifferenceRemedy(*capability_, got));
    }
  }
  if (got.block_size() == 0) {
    return FailedPrecondition("capability.block_size must be at least 1, got 0");
  }
  return absl::OkStatus();
}

void Registry::TakeCapability(const std::string& worker_id, const Capability& capability) {
  capability_ = std::make_unique<Capability>(capability);
  std::vector<std::string> taken;
  if (options_.model_digest.empty()) {
    taken.push_back(fmt::format("weights {} (--model-digest)", capability.model_digest()));
  }
  if (options_.dtype.empty()) taken.push_back(fmt::format("{} (--dtype)", capability.dtype()));
  if (options_.kv_dtype.empty() && capability.kv_dtype() != capability.dtype()) {
    taken.push_back(fmt::format("KV in {} (--kv-cache-dtype)", capability.kv_dtype()));
  }
  if (options_.quantization.empty() && !capability.quantization().empty()) {
    taken.push_back(fmt::format("weights in {} (--quantization)", capability.quantization()));
  }
  if (options_.block_size == 0) {
    taken.push_back(fmt::format("blocks of {} tokens (--block-size)", capability.block_size()));
  }
  if (taken.empty()) return;
  spdlog::info("the first worker, {}, says for the cluster what the router was not told: {}",
               worker_id, fmt::join(taken, ", "));
}

absl::StatusOr<Registry::Member> Registry::Join(WorkerIdentity identity,
                                                const Capability& capability,
                                                std::function<void()> on_drain) {
  Member member;
  std::optional<Member> replaced;
  {
    absl::MutexLock lock(&mutex_);
    TANDEM_RETURN_IF_ERROR(CheckCapability(capability));
    const auto it = workers_.find(identity.id);
    if (it != workers_.end()) {
      const WorkerIdentity& present = *it->second.view.identity;
      if (present.incarnation != identity.incarnation) {
        return AlreadyExists(
            "worker id '{}' is taken by a live worker at {}; give each worker its own --worker-id",
            identity.id, present.address);
      }
      // The same process has dialled again before its old stream was seen to end. Its cache may
      // have changed meanwhile: it will send a snapshot, so what was known goes.
      replaced = present.slot;
      members_.erase(present.slot);
    }
    if (capability_ == nullptr) TakeCapability(identity.id, capability);
    member = index_->AddWorker(static_cast<size_t>(std::max(0, identity.num_blocks)));
    identity.slot = member;
    identity.joined = clock_->Now();
    if (identity.role == WorkerRole::kPrefill) identity.vouch_key = VouchKey(identity.id);
    spdlog::info("worker {} joined: {} at {}, {} blocks, {} sequences", identity.id,
                 WorkerRoleName(identity.role), identity.address, identity.num_blocks,
                 identity.max_num_seqs);
    if (identity.max_model_len > 0 && identity.max_model_len < options_.max_model_len) {
      spdlog::warn(
          "worker {} holds sequences of at most {} tokens, of the {} that the router would take: "
          "it gets no longer ones (its KV pool is small: --kv-cache-memory-bytes, or its "
          "--max-model-len)",
          identity.id, identity.max_model_len, options_.max_model_len);
    }
    const std::string id = identity.id;
    WorkerView view{std::make_shared<const WorkerIdentity>(std::move(identity)),
                    std::make_shared<const LoadReport>(), absl::InfinitePast()};
    const auto entry = workers_.insert_or_assign(id, Entry{std::move(view), std::move(on_drain)});
    members_[member] = &entry.first->second;
    view_.reset();
    ++roster_;
  }
  if (replaced) index_->RemoveWorker(*replaced);
  Notify();
  return member;
}

std::string Registry::VouchKey(const std::string& worker_id) const {
  return VouchKeyFor(vouch_root_, worker_id);
}

Registry::Entry* Registry::FindMember(Member member) {
  const auto it = members_.find(member);
  return it == members_.end() ? nullptr : it->second;
}

void Registry::Leave(Member member) {
  {
    absl::MutexLock lock(&mutex_);
    Entry* entry = FindMember(member);
    if (entry == nullptr) return;
    spdlog::info("worker {} left", entry->view.identity->id);
    members_.erase(member);
    workers_.erase(std::string(entry->view.identity->id));
    if (workers_.empty()) capability_.reset();
    view_.reset();
    ++roster_;
  }
  index_->RemoveWorker(member);
  Notify();
}

void Registry::Report(Member member, LoadReport load) {
  {
    absl::MutexLock lock(&mutex_);
    Entry* entry = FindMember(member);
    if (entry == nullptr) return;
    entry->view.Take(std::move(load));
    entry->view.reported = entry->view.progressed = clock_->Now();
    view_.reset();
  }
  Notify();
}

void Registry::Heartbeat(Member member, absl::Duration without_progress) {
  {
    absl::MutexLock lock(&mutex_);
    Entry* entry = FindMember(member);
    if (entry == nullptr) return;
    absl::Time& progressed = entry->view.progressed;
    progressed = std::max(progressed, clock_->Now() - without_progress);
    view_.reset();
  }
  Notify();
}

void Registry::MarkDraining(Member member) {
  {
    absl::MutexLock lock(&mutex_);
    Entry* entry = FindMember(member);
    if (entry == nullptr || entry->view.draining) return;
    spdlog::info("worker {} drains", entry->view.identity->id);
    entry->view.draining = true;
    view_.reset();
    ++roster_;
  }
  Notify();
}

absl::Status Registry::Drain(const std::string& worker_id) {
  std::function<void()> on_drain;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = workers_.find(worker_id);
    if (it == workers_.end()) {
      std::vector<std::string> ids;
      for (const auto& [id, entry] : workers_) ids.push_back(id);
      return NotFound("worker_id '{}' is not in the cluster; it has [{}]", worker_id,
                      fmt::join(ids, ", "));
    }
    if (it->second.view.draining) return absl::OkStatus();
    it->second.view.draining = true;
    on_drain = it->second.on_drain;
    view_.reset();
    ++roster_;
  }
  if (on_drain) on_drain();
  Notify();
  return absl::OkStatus();
}

std::shared_ptr<const ClusterView> Registry::MakeView() const {
  auto view = std::make_shared<ClusterView>();
  view->workers.reserve(workers_.size());
  for (const auto& [id, entry] : workers_) {
    view->workers.push_back(entry.view);
    if (entry.view.prefills()) continue;
    view->max_model_len = std::max(view->max_model_len, entry.view.identity->max_model_len);
  }
  if (capability_ != nullptr) {
    view->block_size = static_cast<int>(capability_->block_size());
    view->kv_bytes_per_token = KvBytesPerToken(*capability_);
    view->num_layers = static_cast<int>(capability_->num_layers());
    view->model_digest = capability_->model_digest();
    view->dtype = capability_->dtype();
    view->capability = CapabilityLine(*capability_);
  }
  return view;
}

std::shared_ptr<const ClusterView> Registry::view() const {
  absl::MutexLock lock(&mutex_);
  if (view_ == nullptr) view_ = MakeView();
  return view_;
}

}  // namespace tandem::router
