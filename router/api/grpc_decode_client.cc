#include "router/api/grpc_decode_client.h"

#include <utility>

#include "grpcpp/grpcpp.h"

#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"
#include "common/rpc/trace_metadata.h"
#include "router/api/response_wire.h"
#include "tandem/internal/v1/decode.grpc.pb.h"

namespace tandem::router {
namespace {

// Owns itself from Launch() to OnDone(). gRPC allows StartRead outside of its reactions only under
// a hold, and reads start whenever the stream's client has caught up: one hold stands for all reads
// and is given back when reading has ended. OnDone comes only after that, so every path that stops
// reading must release it, or the call never ends.
class GenerateCall : public DecodeCall,
                     public grpc::ClientReadReactor<internal::v1::TokenEvent>,
                     public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(std::shared_ptr<grpc::Channel> channel, std::shared_ptr<DecodeHandler> handler)
      : stub_(internal::v1::Decode::NewStub(std::move(channel))), handler_(std::move(handler)) {}

  void Launch(const Route& route, const Request& request, std::span<const int32_t> generated,
              const TraceContext& trace) {
    self_ = shared_from_this();
    DecodeRequestToProto(route, request, generated, &message_);
    context_.set_deadline(absl::ToChronoTime(request.deadline));
    AddTrace(trace, &context_);
    stub_->async()->Generate(&context_, &message_, this);
    AddHold();
    {
      absl::MutexLock lock(&mutex_);
      reading_ = true;
    }
    StartRead(&event_);
    StartCall();
  }

  void ReadNext() override {
    absl::MutexLock lock(&mutex_);
    if (!holding_ || reading_) return;
    reading_ = true;
    StartRead(&event_);
  }

  void ReadToEnd() override {
    absl::MutexLock lock(&mutex_);
    unwanted_ = true;
    if (!holding_ || reading_) return;
    reading_ = true;
    StartRead(&event_);
  }

  void Cancel() override {
    absl::MutexLock lock(&mutex_);
    unwanted_ = true;
    context_.TryCancel();
    if (!reading_) ReleaseHold();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      absl::MutexLock lock(&mutex_);
      ReleaseHold();
      return;
    }
    TokenEvent event = TokenEventFromProto(event_);
    event_.Clear();
    // It has arrived: a stream need not hold the prompt once more for all of its life. (Clear()
    // would keep the memory.)
    internal::v1::DecodeRequest().Swap(&message_);
    {
      absl::MutexLock lock(&mutex_);
      reading_ = false;
      if (unwanted_) {
        // The event overtook the cancellation, or came behind the last one: nobody will ask for
        // another, so the call must not wait for that.
        context_.TryCancel();
        ReleaseHold();
        return;
      }
    }
    handler_->OnEvent(std::move(event));
  }

  void OnDone(const grpc::Status& status) override {
    handler_->OnEnd(FromGrpcStatus(status));
    handler_.reset();
    self_.reset();
  }

 private:
  void ReleaseHold() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!holding_) return;
    holding_ = false;
    RemoveHold();
  }

  const std::unique_ptr<internal::v1::Decode::Stub> stub_;
  std::shared_ptr<DecodeHandler> handler_;  // only gRPC's reactions
  std::shared_ptr<GenerateCall> self_;      // set in Launch, reset in OnDone
  grpc::ClientContext context_;
  internal::v1::DecodeRequest message_;
  internal::v1::TokenEvent event_;  // belongs to gRPC while reading_
  absl::Mutex mutex_;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool holding_ ABSL_GUARDED_BY(mutex_) = true;
  bool unwanted_ ABSL_GUARDED_BY(mutex_) = false;  // no further event is handed out
};

}  // namespace

std::shared_ptr<grpc::Channel> GrpcDecodeClient::ChannelFor(const std::string& id,
                                                            uint64_t incarnation,
                                                            const std::string& address) {
  Peer& peer = peers_[id];
  if (peer.channel == nullptr || peer.incarnation != incarnation) {
    peer = {incarnation, MakeChannel(address, *credentials_, {kDecodeRole, id})};
    peer.channel->GetState(/*try_to_connect=*/true);
  }
  return peer.channel;
}

std::shared_ptr<DecodeCall> GrpcDecodeClient::Start(const Route& route, const Request& request,
                                                    std::span<const int32_t> generated,
                                                    const TraceContext& trace,
                                                    std::shared_ptr<DecodeHandler> handler) {
  std::shared_ptr<grpc::Channel> channel;
  {
    absl::MutexLock lock(&mutex_);
    channel = ChannelFor(route.decode.id, route.decode.incarnation, route.decode.address);
  }
  auto call = std::make_shared<GenerateCall>(std::move(channel), std::move(handler));
  call->Launch(route, request, generated, trace);
  return call;
}

void GrpcDecodeClient::Keep(const ClusterView& view) {
  absl::MutexLock lock(&mutex_);
  std::erase_if(peers_, [&](const auto& peer) {
    const WorkerView* worker = view.Find(peer.first);
    return worker == nullptr || worker->identity->incarnation != peer.second.incarnation;
  });
  // So that no request waits for the connection and the proof of who is at its other end.
  for (const WorkerView& worker : view.workers) {
    const WorkerIdentity& who = *worker.identity;
    if (!worker.prefills()) ChannelFor(who.id, who.incarnation, who.address);
  }
}

}  // namespace tandem::router
