#include "decode_worker/prefill_client.h"

#include <limits>
#include <utility>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "common/rpc/trace_metadata.h"

namespace tandem::decode {
namespace {

// Worker ids that are drawn come and go with their workers; over this many, all idle channels are
// closed.
constexpr size_t kMaxChannels = 256;
// A shorter prompt is a message in less than a few tens of microseconds.
constexpr size_t kShortPrompt = 2048;

}  // namespace

// One call, as gRPC's threads see it.
class PrefillClient::Active final : public grpc::ClientReadReactor<internal::v1::PrefillEvent> {
 public:
  Active(PrefillClient* client, PrefillCall call) : client_(client), call_(std::move(call)) {}

  const PrefillCall& call() const { return call_; }
  // `self` is kept until gRPC is done with the call.
  void Start(std::shared_ptr<Stub> stub, absl::Duration left, std::shared_ptr<Active> self) {
    stub_ = std::move(stub);
    self_ = std::move(self);
    request_ = CallToProto(call_, client_->identity_);
    call_.tokens = {};
    // By what is left of it: gRPC's deadlines are of the wall clock, the loop's clock is not.
    if (left < absl::InfiniteDuration()) {
      context_.set_deadline(absl::ToChronoTime(absl::Now() + left));
    }
    AddTrace(call_.trace, &context_);
    stub_->async()->Prefill(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (event_.has_wanted()) {
      client_->OnWanted(call_, event_.wanted());
    } else if (event_.has_computed_tokens()) {
      call_.first_token->SendProgress(static_cast<int>(event_.computed_tokens()));
    } else if (event_.has_done() && !std::exchange(answered_, true)) {
      client_->OnAnswer(call_, event_.done());
    }
    StartRead(&event_);
  }
  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<Active> self = std::move(self_);
    if (!answered_) {
      const absl::Status why =
          status.ok()
              ? Internal("prefill worker {} ended the call without an answer", call_.peer.worker_id)
              : FromGrpcStatus(status);
      client_->OnFailure(call_, why, Reached(context_));
    }
    client_->Forget(call_.call_id);
  }

 private:
  PrefillClient* const client_;
  PrefillCall call_;            // without its tokens once it is under way
  std::shared_ptr<Stub> stub_;  // outlives the call
  std::shared_ptr<Active> self_;
  grpc::ClientContext context_;
  internal::v1::PrefillRequest request_;
  internal::v1::PrefillEvent event_;
  bool answered_ = false;
};

PrefillClient::PrefillClient(CallerIdentity identity,
                             std::shared_ptr<const ClusterCredentials> credentials, int vocab_size,
                             EventInbox* inbox, Clock* clock)
    : identity_(std::move(identity)),
      credentials_(std::move(credentials)),
      vocab_size_(vocab_size),
      inbox_(inbox),
      clock_(clock),
      // Bounded by the sequences that the loop has.
      senders_(1, std::numeric_limits<size_t>::max()) {}

PrefillClient::~PrefillClient() {
  absl::MutexLock lock(&mutex_);
  for (auto& [id, active] : active_) active->Cancel();
  mutex_.Await(absl::Condition(
      +[](decltype(active_)* active) { return active->empty(); }, &active_));
}

std::shared_ptr<PrefillClient::Stub> PrefillClient::StubFor(const PrefillPeer& peer) {
  absl::MutexLock lock(&mutex_);
  if (connections_.size() >= kMaxChannels && !connections_.contains(peer.worker_id)) {
    connections_.clear();
  }
  // At another address it is another process, and nobody will need the one before.
  Connection& connection = connections_[peer.worker_id];
  if (connection.address != peer.address) {
    connection = {peer.address, internal::v1::Prefill::NewStub(MakeChannel(
                                    peer.address, *credentials_, {kPrefillRole, peer.worker_id}))};
  }
  return connection.stub;
}

void PrefillClient::Call(PrefillCall call) {
  auto active = std::make_shared<Active>(this, std::move(call));
  {
    absl::MutexLock lock(&mutex_);
    active_[active->call().call_id] = active;
  }
  if (active->call().tokens.size() <= kShortPrompt) return Send(active);
  const bool taken = senders_.TryRun([this, active] { Send(active); });
  TANDEM_CHECK(taken, "a pool without a bound refuses nothing");
}

void PrefillClient::Send(const std::shared_ptr<Active>& active) {
  const PrefillCall& call = active->call();
  active->Start(StubFor(call.peer), call.deadline - clock_->Now(), active);
}

void PrefillClient::OnWanted(const PrefillCall& call, const internal::v1::KvTarget& wanted) {
  absl::StatusOr<BlocksWanted> blocks = WantedFromProto(wanted, call);
  if (blocks.ok()) {
    inbox_->Push(*std::move(blocks));
  } else {  // it will not get them, and computes them
    spdlog::warn("{}: prefill worker {} wants what it was not offered: {}", call.request_id,
                 call.peer.worker_id, blocks.status().ToString());
  }
}

void PrefillClient::OnAnswer(const PrefillCall& call,
                             const internal::v1::PrefillResponse& response) {
  PrefillReply reply{.call_id = call.call_id, .at = clock_->Now()};
  reply.outcome = OutcomeFromProto(response, vocab_size_);
  reply.sent = reply.outcome.ok() && call.first_token->Send(*reply.outcome, reply.at);
  inbox_->Push(std::move(reply));
}

void PrefillClient::OnFailure(const PrefillCall& call, const absl::Status& why, bool reached) {
  inbox_->Push(PrefillReply{
      .call_id = call.call_id, .outcome = why, .at = clock_->Now(), .reached = reached});
}

void PrefillClient::Forget(uint64_t call_id) {
  absl::MutexLock lock(&mutex_);
  active_.erase(call_id);
}

void PrefillClient::Cancel(uint64_t call_id) {
  absl::MutexLock lock(&mutex_);
  auto it = active_.find(call_id);
  if (it != active_.end()) it->second->Cancel();
}

}  // namespace tandem::decode
