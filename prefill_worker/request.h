// What comes in and what goes out of the prefill loop, as plain values (the wire is
// prefill_wire.h's).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/trace.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::prefill {

// Blocks of a prompt that its caller is to send back: target.target_blocks[i] receives prompt block
// first_block + i.
struct Wanted {
  kvtransfer::KvSendTarget target;
  int first_block = 0;
};

struct Outcome {
  TokenLogprob first_token;
  std::vector<TokenLogprob> prompt_logprobs;
  int cached_tokens = 0;
  int returned_tokens = 0;   // of those: came back from the caller
  absl::Duration queue;      // arrived to first chunk started, less kv_return
  absl::Duration kv_return;  // waited for blocks that the caller was asked for
  absl::Duration prefill;    // first chunk started to first token sampled
  uint64_t kv_bytes = 0;     // shipped and still to be shipped
};

// A validated request.
struct Work {
  uint64_t id = 0;  // unique in the process, growing, never 0
  std::string request_id;
  std::vector<int32_t> tokens;  // not empty: the prompt, and what another worker generated
  int prompt_length = 0;        // of `tokens`; 0: all
  engine::SamplingParams sampling;
  std::string cache_salt;
  int priority = 0;  // higher is scheduled earlier
  // target_blocks[i] receives prompt block first_block + i; together they cover the prompt.
  kvtransfer::KvSendTarget target;
  int first_block = 0;
  absl::Time arrived;  // Clock
  absl::Time deadline = absl::InfiniteFuture();
  TraceContext trace;  // the caller's place in it; none: it traces nothing
  // Asks the caller for blocks before `first_block`; null: it gives none. Called at most once,
  // before `reply`, on the loop's thread; must not block.
  std::function<void(const Wanted&)> want;
  // How many tokens are computed, or cached: called on the loop's thread when that is more, until
  // the reply; must not block. Null: nobody asks.
  std::function<void(int)> progress;
  // Called exactly once, on the loop's thread; must not block.
  std::function<void(absl::StatusOr<Outcome>)> reply;
};

}  // namespace tandem::prefill
