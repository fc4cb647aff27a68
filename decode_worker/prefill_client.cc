#include "decode_worker/prefill_client.h"

#include <limits>
#include <utility>

#include "absl/time/clock.h"

#include "common/base/check.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::decode {
namespace {

// Worker ids that are drawn come and go with their workers; over this many, all idle channels are
// closed.
constexpr size_t kMaxChannels = 256;
// A shorter prompt is a message in less than a few tens of microseconds.
constexpr size_t kShortPrompt = 2048;

}  // namespace

struct PrefillClient::Active {
  uint64_t call_id = 0;
  std::shared_ptr<Stub> stub;  // outlives the call
  grpc::ClientContext context;
  internal::v1::PrefillRequest request;
  internal::v1::PrefillResponse response;
  std::shared_ptr<FirstToken> first_token;
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
  for (auto& [id, active] : active_) active->context.TryCancel();
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
  auto active = std::make_shared<Active>();
  active->call_id = call.call_id;
  active->first_token = call.first_token;
  {
    absl::MutexLock lock(&mutex_);
    active_[active->call_id] = active;
  }
  if (call.tokens.size() <= kShortPrompt) return Send(active, call);
  const bool taken =
      senders_.TryRun([this, active, call = std::move(call)] { Send(active, call); });
  TANDEM_CHECK(taken, "a pool without a bound refuses nothing");
}

void PrefillClient::Send(const std::shared_ptr<Active>& active, const PrefillCall& call) {
  active->stub = StubFor(call.peer);
  active->request = CallToProto(call, identity_);
  // By what is left of it: gRPC's deadlines are of the wall clock, the loop's clock is not.
  const absl::Duration left = call.deadline - clock_->Now();
  if (left < absl::InfiniteDuration()) {
    active->context.set_deadline(absl::ToChronoTime(absl::Now() + left));
  }
  // The reaction keeps `active`, and with it the stub, alive.
  active->stub->async()->Prefill(&active->context, &active->request, &active->response,
                                 [this, active](grpc::Status status) { OnDone(active, status); });
}

void PrefillClient::OnDone(const std::shared_ptr<Active>& active, const grpc::Status& status) {
  PrefillReply reply{.call_id = active->call_id, .at = clock_->Now()};
  if (status.ok()) {
    reply.outcome = OutcomeFromProto(active->response, vocab_size_);
    reply.sent = reply.outcome.ok() && active->first_token->Send(*reply.outcome, reply.at);
  } else {
    reply.outcome = FromGrpcStatus(status);
    reply.reached = Reached(active->context);
  }
  inbox_->Push(std::move(reply));
  absl::MutexLock lock(&mutex_);
  active_.erase(active->call_id);
}

void PrefillClient::Cancel(uint64_t call_id) {
  absl::MutexLock lock(&mutex_);
  auto it = active_.find(call_id);
  if (it != active_.end()) it->second->context.TryCancel();
}

}  // namespace tandem::decode
