// One validated, tokenised request, and what its client gets: plain values.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "common/base/token_event.h"
#include "common/base/trace.h"

namespace tandem::internal::v1 {
class DecodeRequest;
}  // namespace tandem::internal::v1

namespace tandem::router {

// Immutable once built (see router/api/request_wire.h).
struct Request {
  std::string id;
  std::string session_id;       // of the conversation; "" where the client names none
  std::string key_name;         // of the API key; "" where none is needed
  TraceContext trace;           // the client's call, or a trace of its own; none: not traced
  std::vector<int32_t> tokens;  // the prompt; at least one
  int max_tokens = 1;
  int min_tokens = 0;
  std::vector<std::string> stop;
  std::string cache_salt;
  int priority = 0;
  absl::Time received;
  absl::Duration tokenize_time;
  absl::Time deadline;  // never InfiniteFuture
  // What the decode worker gets, less the route and the tokens, which are long and stand above.
  std::shared_ptr<const internal::v1::DecodeRequest> message;
};

// What logs call a request: its id, and its session where it has one, with unprintable bytes
// escaped.
std::string LogName(const Request& request);

// What the client gets in one message: tandem.v1.GenerateResponse as a value, less the request's
// id.
struct GenerateResponse {
  std::string text;  // whole UTF-8 characters only
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprob> logprobs;         // empty, or one per token
  std::vector<TokenLogprob> prompt_logprobs;  // with the first token
  FinishReason finish_reason = FinishReason::kNone;
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int completion_tokens = 0;
  DraftCounts drafts;
  std::optional<Timing> timing;        // last message only
  std::optional<int> computed_tokens;  // progress: a message of its own before the first token
};

}  // namespace tandem::router
