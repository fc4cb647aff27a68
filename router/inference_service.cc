#include "router/inference_service.h"

#include <string>
#include <utility>

#include "grpc/support/time.h"
#include "grpcpp/alarm.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "router/message_wire.h"
#include "router/stream/stream_wire.h"

namespace tandem::router {
namespace {

// After the deadline, how long a client that is not reading has to take its last message.
constexpr absl::Duration kLastMessageGrace = absl::Seconds(2);

// Fires RequestStream::OnDeadline. Destroying it disarms it.
class DeadlineTimer : public std::enable_shared_from_this<DeadlineTimer> {
 public:
  explicit DeadlineTimer(std::shared_ptr<RequestStream> stream) : stream_(std::move(stream)) {}

  // Called once.
  void Arm(absl::Time deadline) {
    Set(&deadline_, deadline, [](DeadlineTimer* timer) {
      if (timer->stream_->OnDeadline()) return;
      timer->Set(&timer->grace_, absl::Now() + kLastMessageGrace,
                 [](DeadlineTimer* t) { t->stream_->OnDeadline(); });
    });
  }

 private:
  void Set(grpc::Alarm* alarm, absl::Time when, void (*fire)(DeadlineTimer*)) {
    alarm->Set(absl::ToChronoTime(when), [weak = weak_from_this(), fire](bool expired) {
      if (!expired) return;
      if (const std::shared_ptr<DeadlineTimer> timer = weak.lock()) fire(timer.get());
    });
  }

  const std::shared_ptr<RequestStream> stream_;
  grpc::Alarm deadline_;
  grpc::Alarm grace_;
};

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

// gRPC's side of one stream: turns updates into messages. Owned by gRPC until OnDone.
class InferenceService::Stream : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                                 public StreamSink {
 public:
  Stream(InferenceService* service, grpc::CallbackServerContext* context)
      : service_(service), context_(context) {
    service_->StreamBegan();
  }

  void Begin(Request request) {
    request_id_ = request.id;
    absl::StatusOr<TextEmitter> text =
        TextEmitter::Create(service_->model_->tokenizer, request.stop, request.min_tokens);
    if (!text.ok()) return Refuse(WithField(text.status(), "sampling.stop"));
    const absl::Time deadline = request.deadline;
    auto stream = std::make_shared<RequestStream>(std::move(request), *std::move(text), this,
                                                  service_->context_);
    timer_ = std::make_shared<DeadlineTimer>(stream);
    {
      absl::MutexLock lock(&mutex_);
      stream_ = stream;
      if (cancelled_) stream->OnClientGone();
    }
    timer_->Arm(deadline);
    stream->Begin();
  }

  // Instead of Begin.
  void Refuse(const absl::Status& status) {
    service_->context_.metrics->requests(status.code()).Increment();
    grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(ToGrpcStatus(status));
  }

  // StreamSink.
  void Write(const StreamUpdate& update) override {
    v1::GenerateResponse response;
    FillResponse(request_id_, update, &response);
    buffer_ = WriteMessage(response);
    StartWrite(&buffer_);
  }
  void Finish(const absl::Status& status) override {
    grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(ToGrpcStatus(status));
  }
  void Abort() override { context_->TryCancel(); }

  // gRPC's reactions.
  void OnWriteDone(bool ok) override { stream()->OnWritten(ok); }
  void OnCancel() override {
    std::shared_ptr<RequestStream> stream;
    {
      absl::MutexLock lock(&mutex_);
      cancelled_ = true;
      stream = stream_;
    }
    if (stream != nullptr) stream->OnClientGone();
  }
  void OnDone() override {
    InferenceService* const service = service_;
    delete this;
    service->StreamEnded();
  }

 private:
  std::shared_ptr<RequestStream> stream() {
    absl::MutexLock lock(&mutex_);
    return stream_;
  }

  InferenceService* const service_;
  grpc::CallbackServerContext* const context_;
  std::string request_id_;
  std::shared_ptr<DeadlineTimer> timer_;
  grpc::ByteBuffer buffer_;  // belongs to gRPC during a write
  absl::Mutex mutex_;
  std::shared_ptr<RequestStream> stream_ ABSL_GUARDED_BY(mutex_);  // null before Begin
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

RequestLimits InferenceService::Limits() const {
  const int joined = registry_->view()->max_model_len;
  RequestLimits limits;
  limits.max_model_len = joined > 0 ? joined : model_->config.MaxModelLen();
  limits.max_prompt_bytes = options_.max_prompt_bytes;
  limits.normalize_prompts = options_.normalize_prompts;
  return limits;
}

absl::Time InferenceService::DeadlineOf(const grpc::CallbackServerContext& context,
                                        absl::Time now) const {
  // Of a client without a deadline gRPC gives some time far beyond what a time_point can hold.
  const gpr_timespec deadline = gpr_convert_clock_type(context.raw_deadline(), GPR_CLOCK_REALTIME);
  constexpr int64_t kNever = int64_t{1} << 40;  // seconds
  if (deadline.tv_sec > kNever) return now + options_.request_timeout;
  return absl::FromUnixSeconds(deadline.tv_sec) + absl::Nanoseconds(deadline.tv_nsec);
}

template <typename Message, typename Read>
grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Begin(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes, Read read) {
  const absl::Time received = context_.clock->Now();
  auto* stream = new Stream(this, context);
  if (!accepting_) {
    stream->Refuse(WithRetryAfter(Unavailable("the router is shutting down"), absl::Seconds(1)));
    return stream;
  }
  Message message;
  if (const absl::Status status = ReadMessage(bytes, &message); !status.ok()) {
    stream->Refuse(status);
    return stream;
  }
  absl::StatusOr<Request> request =
      read(*model_, Limits(), message, received, DeadlineOf(*context, received), context_.clock);
  if (request.ok()) {
    stream->Begin(*std::move(request));
  } else {
    stream->Refuse(request.status());
  }
  return stream;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return Begin<v1::GenerateRequest>(context, *request, ReadGenerateRequest);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Chat(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return Begin<v1::ChatRequest>(context, *request, ReadChatRequest);
}

absl::Status InferenceService::DoTokenize(const v1::TokenizeRequest& request,
                                          v1::TokenizeResponse* response) const {
  const RequestLimits limits = Limits();
  TANDEM_RETURN_IF_ERROR(CheckModelName(*model_, request.model()));
  TokenizedPrompt prompt;
  if (request.has_chat()) {
    TANDEM_RETURN_IF_ERROR(CheckModelName(*model_, request.chat().model()));
    TANDEM_ASSIGN_OR_RETURN(prompt, TokenizeChat(*model_, limits, request.chat(), "chat."));
  } else {
    TANDEM_ASSIGN_OR_RETURN(prompt, TokenizeText(*model_, limits, request.text()));
  }
  response->mutable_ids()->Add(prompt.ids.begin(), prompt.ids.end());
  response->set_max_model_len(static_cast<uint32_t>(limits.max_model_len));
  response->set_prompt(prompt.text);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  v1::TokenizeRequest message;
  v1::TokenizeResponse reply;
  absl::Status status = ReadMessage(*request, &message);
  if (status.ok()) status = DoTokenize(message, &reply);
  *response = WriteMessage(reply);
  return Reply(context, status);
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  if (const absl::Status status = CheckModelName(*model_, request->model()); !status.ok()) {
    return Reply(context, status);
  }
  if (model_->tokenizer == nullptr) {
    return Reply(context, FailedPrecondition("model '{}' has no tokenizer.json", model_->name));
  }
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(request->ids_size()));
  for (int i = 0; i < request->ids_size(); ++i) {
    if (request->ids(i) >= static_cast<uint32_t>(model_->config.vocab_size)) {
      const std::string field = fmt::format("ids[{}]", i);
      return Reply(context,
                   WithField(InvalidArgument("{} must be below the vocabulary size {}, got {}",
                                             field, model_->config.vocab_size, request->ids(i)),
                             field));
    }
    ids.push_back(static_cast<int32_t>(request->ids(i)));
  }
  response->set_text(model_->tokenizer->Decode(ids, /*skip_special_tokens=*/false));
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ListModels(grpc::CallbackServerContext* context,
                                                       const v1::ListModelsRequest*,
                                                       v1::ListModelsResponse* response) {
  v1::Model* model = response->add_models();
  model->set_id(model_->name);
  model->set_max_model_len(static_cast<uint32_t>(Limits().max_model_len));
  model->set_vocab_size(static_cast<uint32_t>(model_->config.vocab_size));
  model->set_dtype(registry_->view()->dtype);
  return Reply(context, absl::OkStatus());
}

void InferenceService::StreamBegan() {
  absl::MutexLock lock(&mutex_);
  ++running_;
}

void InferenceService::StreamEnded() {
  absl::MutexLock lock(&mutex_);
  --running_;
}

bool InferenceService::AwaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(this, &InferenceService::Idle), timeout);
}

int InferenceService::running() const {
  absl::MutexLock lock(&mutex_);
  return running_;
}

}  // namespace tandem::router
