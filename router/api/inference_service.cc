#include "router/api/inference_service.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "grpc/support/time.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "router/api/generate_reactor.h"
#include "router/api/message_wire.h"

namespace tandem::router {
namespace {

constexpr char kAuthorizationKey[] = "authorization";

void SendRequestId(grpc::CallbackServerContext* context) {
  context->AddTrailingMetadata(kRequestIdKey, RequestIdOf(*context));
}

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const absl::Status& status) {
  SendRequestId(context);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::Status Behind() {
  return WithRetryAfter(
      ResourceExhausted("the router is behind with reading and tokenising requests"),
      absl::Seconds(1));
}

}  // namespace

absl::StatusOr<InferenceService::Holder> InferenceService::Admit(
    const grpc::CallbackServerContext& context) const {
  if (keys_ == nullptr) return Holder();
  const auto& metadata = context.client_metadata();
  const auto given = metadata.find(kAuthorizationKey);
  if (given == metadata.end()) return keys_->Admit("");
  return keys_->Admit({given->second.data(), given->second.size()});
}

RequestLimits InferenceService::Limits(const KeyHolder* holder) const {
  RequestLimits limits;
  if (holder != nullptr) {
    limits.tenant = holder->entry.tenant;
    limits.key_max_priority = holder->entry.max_priority;
  }
  limits.max_model_len = core_->max_model_len();
  limits.max_prompt_bytes = options_.max_prompt_bytes;
  limits.max_priority = options_.max_priority;
  limits.normalize_prompts = options_.normalize_prompts;
  return limits;
}

absl::Time InferenceService::DeadlineOf(const grpc::CallbackServerContext& context,
                                        absl::Time now) const {
  // gRPC gives a client without a deadline some time far beyond what a time_point can hold, so the
  // raw value is looked at. It is taken over by what is left of it, because our clock does not
  // follow a wall clock that is set.
  const gpr_timespec left =
      gpr_time_sub(gpr_convert_clock_type(context.raw_deadline(), GPR_CLOCK_REALTIME),
                   gpr_now(GPR_CLOCK_REALTIME));
  constexpr int64_t kNever = int64_t{1} << 40;  // seconds
  const absl::Time latest = now + options_.request_timeout;
  if (left.tv_sec > kNever) return latest;
  return std::min(latest, now + absl::Seconds(left.tv_sec) + absl::Nanoseconds(left.tv_nsec));
}

absl::Status InferenceService::MayJoin(const grpc::ByteBuffer& bytes, absl::Time deadline) const {
  absl::Status may = core_->MayJoin(/*priority=*/0, deadline);
  if (may.ok()) return may;
  // Only one of a higher class may be better off.
  const std::optional<int> priority = PriorityOf(bytes);
  if (!priority.has_value()) return absl::OkStatus();
  if (*priority <= 0) return may;
  return core_->MayJoin(std::min(*priority, options_.max_priority), deadline);
}

template <typename Message, typename Read>
grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Begin(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes, Read read) {
  const absl::Time received = core_->clock()->Now();
  auto* reactor = new GenerateReactor(core_, context);
  const absl::StatusOr<Holder> holder = Admit(*context);
  if (!holder.ok()) {
    reactor->Refuse(holder.status());
    return reactor;
  }
  reactor->SetHolder(*holder);
  if (!core_->open_streams().accepting()) {
    reactor->Refuse(WithRetryAfter(Unavailable("the router is shutting down"), absl::Seconds(1)));
    return reactor;
  }
  if (core_->open_streams().open() > options_.max_streams) {
    reactor->Refuse(WithRetryAfter(
        ResourceExhausted("{} streams are open (--max-streams)", options_.max_streams),
        absl::Seconds(1)));
    return reactor;
  }
  const absl::Time deadline = DeadlineOf(*context, received);
  if (const absl::Status may = MayJoin(bytes, deadline); !may.ok()) {
    reactor->Refuse(may);
    return reactor;
  }
  // The call lives until the reactor has answered it.
  const bool taken =
      pool_.TryRun([this, reactor, bytes, read, received, deadline, holder = *holder] {
        Message message;
        if (const absl::Status status = ParseMessage(bytes, &message); !status.ok()) {
          return reactor->Refuse(status);
        }
        reactor->SettleId(message.mutable_options());
        absl::StatusOr<Request> request =
            read(core_->model(), Limits(holder.get()), message, received, deadline, core_->clock());
        if (request.ok()) {
          reactor->Begin(*std::move(request));
        } else {
          reactor->Refuse(request.status());
        }
      });
  if (!taken) reactor->Refuse(Behind());
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::OnPool(grpc::CallbackServerContext* context,
                                                   std::function<absl::Status()> work) {
  if (const auto holder = Admit(*context); !holder.ok()) return Reply(context, holder.status());
  SendRequestId(context);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool taken =
      pool_.TryRun([reactor, work = std::move(work)] { reactor->Finish(ToGrpcStatus(work())); });
  if (!taken) reactor->Finish(ToGrpcStatus(Behind()));
  return reactor;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return Begin<v1::GenerateRequest>(context, *request, GenerateRequestFromProto);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Chat(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return Begin<v1::ChatRequest>(context, *request, ChatRequestFromProto);
}

absl::Status InferenceService::DoTokenize(const v1::TokenizeRequest& request,
                                          v1::TokenizeResponse* response) const {
  const RequestLimits limits = Limits();
  const ServedModel& model = core_->model();
  TANDEM_RETURN_IF_ERROR(CheckModelName(model, request.model()));
  TokenizedPrompt prompt;
  if (request.has_chat()) {
    TANDEM_RETURN_IF_ERROR(CheckModelName(model, request.chat().model()));
    TANDEM_ASSIGN_OR_RETURN(prompt, TokenizeChat(model, limits, request.chat(), "chat."));
  } else {
    TANDEM_ASSIGN_OR_RETURN(prompt, TokenizeText(model, limits, request.text()));
  }
  response->mutable_ids()->Add(prompt.ids.begin(), prompt.ids.end());
  response->set_max_model_len(static_cast<uint32_t>(limits.max_model_len));
  response->set_prompt(prompt.text);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  return OnPool(context, [this, request, response] {
    v1::TokenizeRequest message;
    v1::TokenizeResponse reply;
    absl::Status status = ParseMessage(*request, &message);
    if (status.ok()) status = DoTokenize(message, &reply);
    *response = SerializeMessage(reply);
    return status;
  });
}

absl::Status InferenceService::DoDetokenize(const v1::DetokenizeRequest& request,
                                            v1::DetokenizeResponse* response) const {
  const ServedModel& model = core_->model();
  TANDEM_RETURN_IF_ERROR(CheckModelName(model, request.model()));
  if (model.tokenizer == nullptr) {
    return FailedPrecondition("model '{}' has no tokenizer.json", model.name);
  }
  const int most = Limits().max_model_len;
  if (request.ids_size() > most) {
    return BadField("ids", "must have at most max_model_len = {} entries, got {}", most,
                    request.ids_size());
  }
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(request.ids_size()));
  for (int i = 0; i < request.ids_size(); ++i) {
    if (request.ids(i) >= static_cast<uint32_t>(model.config.vocab_size)) {
      return BadField(fmt::format("ids[{}]", i), "must be below the vocabulary size {}, got {}",
                      model.config.vocab_size, request.ids(i));
    }
    ids.push_back(static_cast<int32_t>(request.ids(i)));
  }
  response->set_text(model.tokenizer->Decode(ids, /*skip_special_tokens=*/false));
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  return OnPool(context, [this, request, response] { return DoDetokenize(*request, response); });
}

grpc::ServerUnaryReactor* InferenceService::ListModels(grpc::CallbackServerContext* context,
                                                       const v1::ListModelsRequest*,
                                                       v1::ListModelsResponse* response) {
  if (const auto holder = Admit(*context); !holder.ok()) return Reply(context, holder.status());
  const ServedModel& served = core_->model();
  v1::Model* model = response->add_models();
  model->set_id(served.name);
  model->set_max_model_len(static_cast<uint32_t>(Limits().max_model_len));
  model->set_vocab_size(static_cast<uint32_t>(served.config.vocab_size));
  model->set_dtype(core_->view()->dtype);
  return Reply(context, absl::OkStatus());
}

}  // namespace tandem::router
