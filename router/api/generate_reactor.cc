#include "router/api/generate_reactor.h"

#include <utility>

#include "common/rpc/status.h"
#include "router/api/message_wire.h"
#include "router/api/response_wire.h"

namespace tandem::router {

std::string RequestIdOf(const grpc::CallbackServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto given = metadata.find(kRequestIdKey);
  if (given == metadata.end()) return RequestIdFrom("");
  return RequestIdFrom({given->second.data(), given->second.size()});
}

void GenerateReactor::Charge(int64_t tokens) {
  if (holder_ != nullptr) holder_->allowance->TakeTokens(tokens, core_->clock()->Now());
}

void GenerateReactor::Begin(Request request) {
  if (holder_ != nullptr) request.key_name = holder_->entry.name;
  request.trace = trace_;
  const auto prompt_tokens = static_cast<int64_t>(request.tokens.size());
  absl::StatusOr<std::shared_ptr<RequestStream>> stream =
      core_->NewStream(std::move(request), this);
  if (!stream.ok()) return Refuse(stream.status());
  Charge(prompt_tokens);
  bool cancelled;
  {
    absl::MutexLock lock(&mutex_);
    stream_ = *stream;
    cancelled = cancelled_;
  }
  // Both ways are needed: OnCancel saw no stream if it came before the lock above, and sees one if
  // it comes later. The local pointer keeps the stream alive, but `this` may be gone after either
  // call.
  if (cancelled) (*stream)->OnClientGone();
  (*stream)->Begin();
}

void GenerateReactor::Refuse(const absl::Status& status) {
  if (holder_ != nullptr && absl::IsPermissionDenied(status)) {
    holder_->allowance->NotePriorityRefused();
  }
  core_->NoteRefused({.id = request_id_,
                      .key_name = holder_ == nullptr ? "" : holder_->entry.name,
                      .trace = trace_,
                      .status = status});
  FinishCall(status);
}

void GenerateReactor::Write(const GenerateResponse& response) {
  Charge(response.completion_tokens - charged_tokens_);
  charged_tokens_ = response.completion_tokens;
  v1::GenerateResponse message;
  ResponseToProto(request_id_, response, &message);
  buffer_ = SerializeMessage(message);
  StartWrite(&buffer_);
}

void GenerateReactor::Finish(const absl::Status& status) { FinishCall(status); }

void GenerateReactor::FinishCall(const absl::Status& status) {
  context_->AddTrailingMetadata(kRequestIdKey, request_id_);
  grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(ToGrpcStatus(status));
}

void GenerateReactor::OnWriteDone(bool ok) {
  std::shared_ptr<RequestStream> stream;
  {
    absl::MutexLock lock(&mutex_);
    stream = stream_;
  }
  stream->OnWritten(ok);
}

void GenerateReactor::OnCancel() {
  std::shared_ptr<RequestStream> stream;
  {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;
    stream = stream_;
  }
  if (stream != nullptr) stream->OnClientGone();
}

}  // namespace tandem::router
