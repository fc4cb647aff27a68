// What comes in and what goes out of the decode loop, as plain values (the wire is
// decode_wire.h's).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::decode {

struct PrefillPeer {
  std::string worker_id;
  std::string address;  // HOST:PORT
};

// A validated request.
struct Work {
  uint64_t id = 0;  // unique in the process, growing, never 0
  std::string request_id;
  std::vector<int32_t> tokens;  // the prompt, 1 to max_model_len - 1 of them
  engine::SamplingParams sampling;
  std::string cache_salt;
  int priority = 0;                  // higher is scheduled earlier
  std::vector<PrefillPeer> prefill;  // best first; empty: prefill here
  absl::Time arrived;                // Clock
  absl::Time deadline = absl::InfiniteFuture();
};

enum class FinishReason { kNone, kStop, kLength };

// The stages that the workers know, in milliseconds (see common/base/stage.h).
struct WorkerTimes {
  double decode_queue = 0;
  double prefill_queue = 0;
  double prefill = 0;
  double kv_transfer_total = 0;
  double kv_transfer_exposed = 0;
  double first_decode_step = 0;
  uint64_t kv_bytes = 0;
  std::string prefill_worker;
  std::string transport;  // "local" where nothing was shipped
  int prefill_attempts = 0;
  int preemptions = 0;
};

// Consecutive tokens of one request and what is known beside them.
struct TokenDelta {
  std::vector<engine::TokenLogprob> tokens;
  std::vector<engine::TokenLogprob> prompt_logprobs;  // with the first token only
  FinishReason finish = FinishReason::kNone;
  int cached_tokens = 0;
  std::optional<WorkerTimes> times;  // with the first and the last token
};

}  // namespace tandem::decode
