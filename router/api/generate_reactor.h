// gRPC's side of one Generate or Chat call: a StreamSink that writes responses as messages. The
// stream behind it does everything else (see router/request/stream_sink.h).
//
// Owned by gRPC until OnDone. gRPC serialises OnWriteDone and OnDone; OnCancel may come at any time
// from the call's arrival on, also before there is a stream.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"

#include "common/rpc/trace_metadata.h"
#include "router/api/request_wire.h"
#include "router/core/router_core.h"
#include "router/keys/key_holder.h"
#include "router/request/open_streams.h"
#include "router/request/request_stream.h"
#include "router/request/stream_sink.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

// The trailing metadata of every call of the public API, and what a client may send as its own.
inline constexpr char kRequestIdKey[] = "x-request-id";
std::string RequestIdOf(const grpc::CallbackServerContext& context);

class GenerateReactor : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public StreamSink {
 public:
  GenerateReactor(RouterCore* core, grpc::CallbackServerContext* context)
      : slot_(core->open_streams().Open()),
        core_(core),
        context_(context),
        trace_(TraceOf(*context)),
        request_id_(RequestIdOf(*context)) {}

  // Who pays for the tokens; null, as without this call: nobody. Before Begin and Refuse.
  void SetHolder(std::shared_ptr<const KeyHolder> holder) { holder_ = std::move(holder); }
  // The message is here: its id may replace that of the call, or is filled in. Before Begin.
  void SettleId(v1::RequestOptions* options) { SettleRequestId(options, &request_id_); }
  // One of the two, once.
  void Begin(Request request);
  void Refuse(const absl::Status& status);

  // StreamSink.
  void Write(const GenerateResponse& response) override;
  void Finish(const absl::Status& status) override;
  void Abort() override { context_->TryCancel(); }

  // gRPC's reactions.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  void FinishCall(const absl::Status& status);
  void Charge(int64_t tokens);

  const OpenStreams::Slot slot_;  // first, so that it is given back last
  RouterCore* const core_;
  grpc::CallbackServerContext* const context_;
  const TraceContext trace_;                 // as the client says it
  std::shared_ptr<const KeyHolder> holder_;  // constant from Begin or Refuse on
  std::string request_id_;                   // so too
  int charged_tokens_ = 0;                   // of the answer; only in Write
  grpc::ByteBuffer buffer_;                  // belongs to gRPC during a write
  absl::Mutex mutex_;
  std::shared_ptr<RequestStream> stream_ ABSL_GUARDED_BY(mutex_);  // null before Begin
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem::router
