#include "router/registry/cluster_service.h"

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

using internal::v1::RouterMessage;
using internal::v1::WorkerMessage;

constexpr size_t kMaxWorkerIdBytes = 128;

absl::StatusOr<WorkerIdentity> ReadHello(const internal::v1::Hello& hello) {
  WorkerIdentity out;
  if (hello.worker_id().empty() || hello.worker_id().size() > kMaxWorkerIdBytes) {
    return InvalidArgument("hello.worker_id must have 1 to {} bytes, got {}", kMaxWorkerIdBytes,
                           hello.worker_id().size());
  }
  if (hello.role() == "prefill") {
    out.role = WorkerRole::kPrefill;
  } else if (hello.role() == "decode") {
    out.role = WorkerRole::kDecode;
  } else if (hello.role() == "unified") {
    out.role = WorkerRole::kUnified;
  } else {
    return InvalidArgument("hello.role must be prefill, decode or unified, got '{}'", hello.role());
  }
  if (hello.address().empty()) return InvalidArgument("hello.address must be HOST:PORT, got ''");
  out.id = hello.worker_id();
  out.incarnation = hello.incarnation();
  out.address = hello.address();
  out.metrics_address = hello.metrics_address();
  out.max_model_len = static_cast<int>(hello.max_model_len());
  out.max_num_seqs = static_cast<int>(hello.max_num_seqs());
  out.num_blocks = static_cast<int>(hello.num_blocks());
  out.local_prefill_max_tokens = hello.local_prefill_max_tokens();
  return out;
}

WorkerLoad ReadLoad(const internal::v1::LoadReport& report) {
  WorkerLoad load;
  load.running = static_cast<int>(report.running());
  load.waiting = static_cast<int>(report.waiting());
  load.waiting_tokens = static_cast<int64_t>(report.waiting_tokens());
  load.blocks_free = static_cast<int>(report.blocks_free());
  load.blocks_cached = static_cast<int>(report.blocks_cached());
  load.blocks_used = static_cast<int>(report.blocks_used());
  load.blocks_quarantined = static_cast<int>(report.blocks_quarantined());
  load.prefill_tokens_per_second = report.prefill_tokens_per_second();
  load.decode_step_milliseconds = report.decode_step_milliseconds();
  for (const auto& link : report.links()) {
    load.link_bytes_per_second[link.peer_worker_id()] = link.bytes_per_second();
  }
  return load;
}

// False if an entry is not a hash.
bool ReadHashes(const google::protobuf::RepeatedPtrField<std::string>& bytes,
                std::vector<Hash128>* out) {
  out->resize(static_cast<size_t>(bytes.size()));
  for (int i = 0; i < bytes.size(); ++i) {
    if (!Hash128::FromBytes(bytes[i], &(*out)[static_cast<size_t>(i)])) return false;
  }
  return true;
}

}  // namespace

// One worker's stream. Reads follow one another in gRPC's reactions; writes are queued, because a
// drain may be asked for from any thread.
class ClusterService::Stream : public grpc::ServerBidiReactor<WorkerMessage, RouterMessage>,
                               public std::enable_shared_from_this<ClusterService::Stream> {
 public:
  explicit Stream(ClusterService* service) : service_(service) {}

  // Keeps itself alive until OnDone.
  void Start() {
    self_ = shared_from_this();
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus());
    const absl::Status status = Handle(incoming_);
    if (!status.ok()) {
      spdlog::warn("worker refused: {}", std::string(status.message()));
      return End(status);
    }
    incoming_.Clear();
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    outgoing_.pop_front();
    if (!ok) outgoing_.clear();
    WriteNext();
  }

  void OnCancel() override { End(absl::CancelledError("the stream was cancelled")); }

  void OnDone() override {
    LeaveRegistry();
    self_.reset();
  }

 private:
  absl::Status Handle(const WorkerMessage& message) {
    if (message.has_hello()) return HandleHello(message.hello());
    const std::optional<Registry::Member> member = this->member();
    if (!member.has_value()) return InvalidArgument("the first message must be hello");
    if (message.has_load()) {
      service_->registry_->Report(*member, ReadLoad(message.load()));
    } else if (message.has_blocks()) {
      std::vector<Hash128> stored, removed;
      if (!ReadHashes(message.blocks().stored(), &stored) ||
          !ReadHashes(message.blocks().removed(), &removed)) {
        return InvalidArgument("blocks: every hash must have 16 bytes");
      }
      service_->index_->Apply(*member, message.blocks().cleared(), stored, removed);
    } else if (message.has_draining()) {
      service_->registry_->MarkDraining(*member);
    }
    return absl::OkStatus();
  }

  absl::Status HandleHello(const internal::v1::Hello& hello) {
    if (member().has_value()) return InvalidArgument("hello must come only once");
    TANDEM_ASSIGN_OR_RETURN(WorkerIdentity identity, ReadHello(hello));
    std::weak_ptr<Stream> weak = weak_from_this();
    TANDEM_ASSIGN_OR_RETURN(
        const Registry::Member joined,
        service_->registry_->Join(std::move(identity), hello.capability(), [weak] {
          if (const std::shared_ptr<Stream> stream = weak.lock()) stream->SendDrain();
        }));
    bool ended;
    {
      absl::MutexLock lock(&mutex_);
      member_ = joined;
      ended = ended_;
      RouterMessage welcome;
      welcome.mutable_welcome()->set_router_id(service_->router_id_);
      outgoing_.push_back(std::move(welcome));
      WriteNext();
    }
    if (ended) LeaveRegistry();
    return absl::OkStatus();
  }

  void SendDrain() {
    absl::MutexLock lock(&mutex_);
    RouterMessage drain;
    drain.mutable_drain();
    outgoing_.push_back(std::move(drain));
    WriteNext();
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || ended_ || outgoing_.empty()) return;
    writing_ = true;
    StartWrite(&outgoing_.front());
  }

  void End(const absl::Status& status) {
    LeaveRegistry();
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    ended_ = true;
    Finish(ToGrpcStatus(status));
  }

  void LeaveRegistry() {
    if (const std::optional<Registry::Member> member = this->member()) {
      service_->registry_->Leave(*member);
    }
  }

  std::optional<Registry::Member> member() {
    absl::MutexLock lock(&mutex_);
    return member_;
  }

  ClusterService* const service_;
  std::shared_ptr<Stream> self_;  // set before the first reaction, reset in the last
  WorkerMessage incoming_;        // only gRPC's read reactions
  absl::Mutex mutex_;
  std::optional<Registry::Member> member_ ABSL_GUARDED_BY(mutex_);
  std::deque<RouterMessage> outgoing_ ABSL_GUARDED_BY(mutex_);  // the front one is being written
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
};

grpc::ServerBidiReactor<WorkerMessage, RouterMessage>* ClusterService::Join(
    grpc::CallbackServerContext*) {
  auto stream = std::make_shared<Stream>(this);
  stream->Start();
  return stream.get();
}

}  // namespace tandem::router
