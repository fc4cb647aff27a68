// What is known of a request's tokens and times on their way from the engine to the client. Plain
// values, shared by the engine, the workers and the router; common/rpc/token_wire.h turns them into
// messages of the same names.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/base/stage.h"

namespace tandem {

// A token and its natural logarithm of probability in the model's own distribution, before
// temperature, penalties and truncation.
struct TokenLogprob {
  struct Alternative {
    int32_t token = 0;
    float logprob = 0;
  };
  int32_t token = 0;
  float logprob = 0;
  std::vector<Alternative> top;  // most likely first
};

enum class FinishReason {
  kNone,    // not finished
  kStop,    // end of sequence, a stop token or a stop string
  kLength,  // max_tokens or max_model_len reached
  kAbort,   // the cluster gave the request up; the status says why
};

// Where a request's time went and who worked on it. Workers fill in the stages that they see, the
// router the rest.
struct Timing {
  StageTimes stages;
  uint64_t kv_bytes = 0;  // shipped for this request
  std::string prefill_worker;
  std::string decode_worker;
  std::string transport;  // "local" where nothing was shipped
  int prefill_attempts = 0;
  int returned_tokens = 0;  // of the prompt, whose KV came back from the decode worker
  int preemptions = 0;
  int migrations = 0;
};

// Speculation: tokens that were guessed and computed ahead, and those of them that were drawn.
struct DraftCounts {
  int drafted = 0;
  int accepted = 0;

  void Add(const DraftCounts& more) {
    drafted += more.drafted;
    accepted += more.accepted;
  }
};

// Consecutive tokens of one request and what is known beside them.
struct TokenEvent {
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprob> logprobs;         // empty, or one per token
  std::vector<TokenLogprob> prompt_logprobs;  // with the first token; entry i is prompt token i + 1
  FinishReason finish_reason = FinishReason::kNone;
  int cached_tokens = 0;         // prompt tokens whose KV was not computed for this request
  std::optional<Timing> timing;  // first and last event
  // Of the prompt, so far: an event of its own before the first token, where the client asks.
  std::optional<int> computed_tokens;
  DraftCounts drafts;  // since the event before
};

}  // namespace tandem
