#include "cli/inference_client.h"

#include <cstdint>

#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::cli {
namespace {

// For calls that compute nothing.
constexpr absl::Duration kShortCall = absl::Seconds(10);

}  // namespace

InferenceClient::InferenceClient(PublicServer server)
    : server_(std::move(server)),
      stub_(v1::Inference::NewStub(MakeChannel(server_, Patience::kPatient))) {}

double Answer::TtftMs() const {
  return whole.has_timing() ? whole.timing().ttft() : absl::ToDoubleMilliseconds(to_first);
}

double Answer::DecodeMs() const {
  return whole.has_timing() ? whole.timing().total() - whole.timing().ttft()
                            : absl::ToDoubleMilliseconds(to_last - to_first);
}

double Answer::TpotMs() const {
  const uint32_t tokens = whole.usage().completion_tokens();
  return tokens > 1 ? DecodeMs() / (tokens - 1) : 0;
}

double Answer::TokensPerSecond() const { return TpotMs() > 0 ? 1000 / TpotMs() : 0; }

template <typename Request, typename Method>
Answer InferenceClient::Call(const Request& request, Method method, absl::Duration timeout,
                             const OnText& on_text, const OnProgress& on_progress) {
  grpc::ClientContext context;
  ShowKey(server_, &context);
  if (timeout < absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  }
  SetRunning(&context);
  Answer answer;
  std::string text;
  v1::GenerateResponse message;
  const absl::Time begin = absl::Now();
  const auto reader = (stub_.get()->*method)(&context, request);
  while (reader->Read(&message)) {
    if (message.has_progress()) {
      if (on_progress) on_progress(message.progress());
      continue;
    }
    answer.to_last = absl::Now() - begin;
    if (answer.whole.token_ids().empty()) answer.to_first = answer.to_last;
    if (!message.text().empty() && on_text) on_text(message.text());
    text += message.text();
    answer.whole.MergeFrom(message);
  }
  answer.whole.set_text(std::move(text));  // MergeFrom joins lists, but replaces strings
  answer.status = FromGrpcStatus(reader->Finish());
  SetRunning(nullptr);
  return answer;
}

void InferenceClient::SetRunning(grpc::ClientContext* context) {
  absl::MutexLock lock(&mutex_);
  running_ = context;
}

absl::StatusOr<v1::Model> InferenceClient::GetModel() {
  grpc::ClientContext context;
  ShowKey(server_, &context);
  context.set_deadline(absl::ToChronoTime(absl::Now() + kShortCall));
  SetRunning(&context);
  v1::ListModelsResponse response;
  const grpc::Status status = stub_->ListModels(&context, {}, &response);
  SetRunning(nullptr);
  if (!status.ok()) return FromGrpcStatus(status);
  if (response.models().empty()) return NotFound("it serves no model");
  return response.models(0);
}

absl::StatusOr<v1::TokenizeResponse> InferenceClient::Tokenize(const v1::ChatRequest& request) {
  grpc::ClientContext context;
  ShowKey(server_, &context);
  context.set_deadline(absl::ToChronoTime(absl::Now() + kShortCall));
  v1::TokenizeRequest message;
  message.set_model(request.model());
  *message.mutable_chat() = request;
  v1::TokenizeResponse response;
  const grpc::Status status = stub_->Tokenize(&context, message, &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

Answer InferenceClient::Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                                 const OnText& on_text, const OnProgress& on_progress) {
  return Call(request, &v1::Inference::Stub::Generate, timeout, on_text, on_progress);
}

Answer InferenceClient::Chat(const v1::ChatRequest& request, absl::Duration timeout,
                             const OnText& on_text, const OnProgress& on_progress) {
  return Call(request, &v1::Inference::Stub::Chat, timeout, on_text, on_progress);
}

bool InferenceClient::Cancel() {
  absl::MutexLock lock(&mutex_);
  if (running_ == nullptr) return false;
  running_->TryCancel();
  return true;
}

}  // namespace tandem::cli
