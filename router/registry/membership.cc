#include "router/registry/membership.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

#include "common/base/status.h"
#include "common/rpc/load_wire.h"

namespace tandem::router {
namespace {

using internal::v1::RouterMessage;
using internal::v1::WorkerMessage;

constexpr size_t kMaxWorkerIdBytes = 128;
constexpr size_t kMaxTextBytes = 256;  // of every other text
constexpr int kMaxEntries = 4096;      // of a list

// Every text of a message of a worker, and of the messages in it, has a bound, and nothing in it
// that would look like another line where it is logged.
absl::Status CheckTexts(const google::protobuf::Message& message, const std::string& path) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection* reflection = message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string name = path + "." + field->name();
    if (field->is_repeated()) {
      const int size = reflection->FieldSize(message, field);
      if (size > kMaxEntries) {
        return InvalidArgument("{} must have at most {} entries, got {}", name, kMaxEntries, size);
      }
      for (int i = 0; i < size && field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE; ++i) {
        TANDEM_RETURN_IF_ERROR(CheckTexts(reflection->GetRepeatedMessage(message, field, i), name));
      }
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      TANDEM_RETURN_IF_ERROR(CheckTexts(reflection->GetMessage(message, field), name));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
      std::string copy;
      const std::string& text = reflection->GetStringReference(message, field, &copy);
      if (text.size() > kMaxTextBytes) {
        return InvalidArgument("{} must have at most {} bytes, got {}", name, kMaxTextBytes,
                               text.size());
      }
      if (std::any_of(text.begin(), text.end(), absl::ascii_iscntrl)) {
        return InvalidArgument("{} holds control characters", name);
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<WorkerRole> RoleFromProto(const std::string& name) {
  for (const WorkerRole role : {WorkerRole::kPrefill, WorkerRole::kDecode, WorkerRole::kUnified}) {
    if (name == WorkerRoleName(role)) return role;
  }
  return InvalidArgument("hello.role must be prefill, decode or unified, got '{}'",
                         absl::CEscape(name));
}

absl::StatusOr<WorkerIdentity> IdentityFromProto(const internal::v1::Hello& hello) {
  WorkerIdentity out;
  TANDEM_RETURN_IF_ERROR(CheckTexts(hello, "hello"));
  if (hello.worker_id().empty() || hello.worker_id().size() > kMaxWorkerIdBytes) {
    return InvalidArgument("hello.worker_id must have 1 to {} bytes, got {}", kMaxWorkerIdBytes,
                           hello.worker_id().size());
  }
  TANDEM_ASSIGN_OR_RETURN(out.role, RoleFromProto(hello.role()));
  if (hello.address().empty()) return InvalidArgument("hello.address must be HOST:PORT, got ''");
  out.id = hello.worker_id();
  out.incarnation = hello.incarnation();
  out.address = hello.address();
  out.metrics_address = hello.metrics_address();
  out.kv_address = hello.kv_address();
  out.max_model_len = static_cast<int>(hello.max_model_len());
  out.max_num_seqs = static_cast<int>(hello.max_num_seqs());
  out.num_blocks = static_cast<int>(hello.num_blocks());
  out.local_prefill_max_tokens = hello.local_prefill_max_tokens();
  return out;
}

// False if an entry is not a hash.
bool HashesFromProto(const google::protobuf::RepeatedPtrField<std::string>& bytes,
                     std::vector<Hash128>* out) {
  out->resize(static_cast<size_t>(bytes.size()));
  for (int i = 0; i < bytes.size(); ++i) {
    if (!Hash128::FromBytes(bytes[i], &(*out)[static_cast<size_t>(i)])) return false;
  }
  return true;
}

}  // namespace

Membership::Membership(std::string router_id, Registry* registry, PrefixIndex* index, Send send)
    : router_id_(std::move(router_id)),
      registry_(registry),
      index_(index),
      send_(std::move(send)) {}

Membership::~Membership() { Leave(); }

absl::Status Membership::Handle(const WorkerMessage& message) {
  if (message.has_hello()) return HandleHello(message.hello());
  const std::optional<Registry::Member> member = this->member();
  if (!member.has_value()) return InvalidArgument("the first message must be hello");
  if (message.has_load()) {
    TANDEM_RETURN_IF_ERROR(CheckTexts(message.load(), "load"));
    registry_->Report(*member, LoadReportFromProto(message.load()));
  } else if (message.has_blocks()) {
    std::vector<Hash128> stored, removed;
    if (!HashesFromProto(message.blocks().stored(), &stored) ||
        !HashesFromProto(message.blocks().removed(), &removed)) {
      return InvalidArgument("blocks: every hash must have 16 bytes");
    }
    index_->Apply(*member, message.blocks().cleared(), stored, removed);
  } else if (message.has_heartbeat()) {
    const double seconds = message.heartbeat().seconds_without_progress();
    if (seconds >= 0) registry_->Heartbeat(*member, absl::Seconds(seconds));
  } else if (message.has_draining()) {
    registry_->MarkDraining(*member);
  }
  return absl::OkStatus();
}

absl::Status Membership::HandleHello(const internal::v1::Hello& hello) {
  if (member().has_value()) return InvalidArgument("hello must come only once");
  TANDEM_ASSIGN_OR_RETURN(WorkerIdentity identity, IdentityFromProto(hello));
  RouterMessage welcome;
  welcome.mutable_welcome()->set_router_id(router_id_);
  if (identity.role == WorkerRole::kPrefill) {
    welcome.mutable_welcome()->set_vouch_key(registry_->VouchKey(identity.id));
  }
  // The registry may call this while the stay ends, so it holds a copy of `send_` and not `this`.
  const auto drain = [send = send_] {
    RouterMessage message;
    message.mutable_drain();
    send(std::move(message));
  };
  TANDEM_ASSIGN_OR_RETURN(const Registry::Member joined,
                          registry_->Join(std::move(identity), hello.capability(), drain));
  bool left;
  {
    absl::MutexLock lock(&mutex_);
    member_ = joined;
    left = left_;
  }
  if (left) {
    // Leave() came between Join and here, and did not know of the member yet.
    registry_->Leave(joined);
    return absl::OkStatus();
  }
  send_(std::move(welcome));
  return absl::OkStatus();
}

void Membership::Leave() {
  std::optional<Registry::Member> member;
  {
    absl::MutexLock lock(&mutex_);
    left_ = true;
    member = member_;
  }
  if (member.has_value()) registry_->Leave(*member);
}

std::optional<Registry::Member> Membership::member() const {
  absl::MutexLock lock(&mutex_);
  return member_;
}

}  // namespace tandem::router
