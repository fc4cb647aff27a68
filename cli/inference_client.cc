#include "cli/inference_client.h"

#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::cli {

InferenceClient::InferenceClient(const std::string& server)
    : stub_(v1::Inference::NewStub(MakeChannel(server, Patience::kPatient))) {}

double Answer::TokensPerSecond() const {
  const double decode_ms = whole.timing().total() - whole.timing().ttft();
  const uint32_t tokens = whole.usage().completion_tokens();
  return tokens > 1 && decode_ms > 0 ? (tokens - 1) * 1000.0 / decode_ms : 0;
}

template <typename Request, typename Method>
Answer InferenceClient::Call(const Request& request, Method method, absl::Duration timeout,
                             const OnText& on_text) {
  grpc::ClientContext context;
  if (timeout < absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  }
  {
    absl::MutexLock lock(&mutex_);
    running_ = &context;
  }
  Answer answer;
  std::string text;
  v1::GenerateResponse message;
  const auto reader = (stub_.get()->*method)(&context, request);
  while (reader->Read(&message)) {
    if (!message.text().empty() && on_text) on_text(message.text());
    text += message.text();
    answer.whole.MergeFrom(message);
  }
  answer.whole.set_text(std::move(text));  // MergeFrom joins lists, but replaces strings
  answer.status = FromGrpcStatus(reader->Finish());
  absl::MutexLock lock(&mutex_);
  running_ = nullptr;
  return answer;
}

Answer InferenceClient::Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                                 const OnText& on_text) {
  return Call(request, &v1::Inference::Stub::Generate, timeout, on_text);
}

Answer InferenceClient::Chat(const v1::ChatRequest& request, absl::Duration timeout,
                             const OnText& on_text) {
  return Call(request, &v1::Inference::Stub::Chat, timeout, on_text);
}

bool InferenceClient::Cancel() {
  absl::MutexLock lock(&mutex_);
  if (running_ == nullptr) return false;
  running_->TryCancel();
  return true;
}

}  // namespace tandem::cli
