// Public messages -> validated, tokenised requests. Pure functions of their arguments, but for ids
// and seeds drawn where the client gives none.
//
// Every refusal names the field in a google.rpc.BadRequest detail, the limit, and what to do. All
// are INVALID_ARGUMENT, but for a priority that the client's key does not allow: PERMISSION_DENIED.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/support/byte_buffer.h"

#include "common/base/clock.h"
#include "router/request/request.h"
#include "router/request/served_model.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

struct RequestLimits {
  int max_model_len = 0;  // tokens, prompt and output together
  size_t max_prompt_bytes = 4u << 20;
  int max_priority = 2;            // a client's priority is taken within [-this, this]
  bool normalize_prompts = false;  // see common/text/normalize.h
  // Of the client's API key: whose cached prefixes it shares ("": those of all without a tenant),
  // and the priority above which it is refused.
  std::string tenant;
  std::optional<int> key_max_priority;
};

struct TokenizedPrompt {
  std::vector<int32_t> ids;
  std::string text;  // what was tokenised
};

// OK for an empty name and for the served one; NOT_FOUND names the served one.
absl::Status CheckModelName(const ServedModel& model, const std::string& name);

// `prefix` stands before field names, e.g. "chat.". FAILED_PRECONDITION where the model has no
// tokenizer or no chat template.
absl::StatusOr<TokenizedPrompt> TokenizeText(const ServedModel& model, const RequestLimits& limits,
                                             const std::string& text);
absl::StatusOr<TokenizedPrompt> TokenizeChat(const ServedModel& model, const RequestLimits& limits,
                                             const v1::ChatRequest& request,
                                             const std::string& prefix);

// A request's name in logs and traces: what the client sent as metadata x-request-id, cut to the
// length of an id, with what is no printable ASCII escaped; drawn where it sent none.
std::string RequestIdFrom(std::string_view given);

// `options.request_id`, if it is one, replaces `id`; else `id` becomes the message's.
void SettleRequestId(v1::RequestOptions* options, std::string* id);

// options.priority of a Generate or Chat request that was not parsed yet: the message's fields are
// passed over. Nothing: it is no message, or has so many fields that finding it is no small matter.
std::optional<int> PriorityOf(const grpc::ByteBuffer& bytes);

absl::StatusOr<Request> GenerateRequestFromProto(const ServedModel& model,
                                                 const RequestLimits& limits,
                                                 const v1::GenerateRequest& message,
                                                 absl::Time received, absl::Time deadline,
                                                 Clock* clock);
absl::StatusOr<Request> ChatRequestFromProto(const ServedModel& model, const RequestLimits& limits,
                                             const v1::ChatRequest& message, absl::Time received,
                                             absl::Time deadline, Clock* clock);

}  // namespace tandem::router
