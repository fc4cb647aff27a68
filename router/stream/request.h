// One validated, tokenised request, and what flows through its stream: plain values.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tandem::internal::v1 {
class DecodeRequest;
}  // namespace tandem::internal::v1

namespace tandem::router {

// Immutable once built (see request_wire.h).
struct Request {
  std::string id;
  std::vector<int32_t> tokens;  // the prompt; at least one
  int max_tokens = 1;
  int min_tokens = 0;
  std::vector<std::string> stop;
  std::string cache_salt;
  int priority = 0;
  absl::Time received;
  absl::Duration tokenize_time;
  absl::Time deadline;  // never InfiniteFuture
  // What the decode worker gets, less the route.
  std::shared_ptr<const internal::v1::DecodeRequest> message;
};

enum class FinishReason { kNone, kStop, kLength, kAbort };

struct TokenAlternative {
  int32_t token_id = 0;
  float logprob = 0;
};

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;
  std::vector<TokenAlternative> top;  // most likely first
};

// The stages that workers know; milliseconds.
struct WorkerTiming {
  double decode_queue = 0;
  double prefill_queue = 0;
  double prefill = 0;
  double kv_transfer_total = 0;
  double kv_transfer_exposed = 0;
  double first_decode_step = 0;
  uint64_t kv_bytes = 0;
  std::string prefill_worker;
  std::string transport;
};

// Consecutive tokens from the decode worker.
struct TokenEvent {
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprob> logprobs;  // empty, or one per token
  std::vector<TokenLogprob> prompt_logprobs;
  FinishReason finish_reason = FinishReason::kNone;
  int cached_tokens = 0;
  std::optional<WorkerTiming> timing;
};

// All stages of one request; milliseconds. Field names are those of kStages.
struct RequestTiming {
  double queue = 0;
  double tokenize = 0;
  double ttft = 0;
  double total = 0;
  WorkerTiming worker;  // its decode_queue is part of `queue`
  std::string decode_worker;
};

// What the client gets in one message.
struct StreamUpdate {
  std::string text;
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprob> logprobs;
  std::vector<TokenLogprob> prompt_logprobs;
  FinishReason finish_reason = FinishReason::kNone;
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int completion_tokens = 0;
  std::optional<RequestTiming> timing;  // last message only
};

// Where a request was sent.
struct Assignment {
  std::string decode_worker;
  uint64_t incarnation = 0;
  std::string decode_address;
  struct Prefill {
    std::string worker_id;
    std::string address;
  };
  std::vector<Prefill> prefill;  // best first; empty: the decode worker prefills itself
  std::string reason;
  int predicted_cached_tokens = 0;
  absl::Time reported;  // when the decode worker had last reported
};

// A decode worker that did not serve an assignment.
struct Refusal {
  enum class Kind { kLost, kFull };
  Kind kind = Kind::kLost;
  std::string worker;
  uint64_t incarnation = 0;
  absl::Time reported;  // Assignment::reported of that assignment
  absl::Time at;
};

}  // namespace tandem::router
