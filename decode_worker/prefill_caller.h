// The seam between the loop and the prefill workers: asks one of them for one prompt.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/trace.h"
#include "common/base/transfer_id.h"
#include "decode_worker/first_token.h"
#include "decode_worker/request.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

struct PrefillCall {
  uint64_t call_id = 0;  // of this attempt
  PrefillPeer peer;
  std::string request_id;
  std::vector<int32_t> tokens;
  int prompt_length = 0;  // of `tokens`; what follows was generated elsewhere
  engine::SamplingParams sampling;
  std::string cache_salt;
  int priority = 0;
  bool progress = false;  // the client wants to know how far the prompt is
  TransferId transfer;
  uint64_t epoch = 0;
  std::string token;               // of KvReceiver::Expect
  int first_block = 0;             // of the prompt, that is shipped
  std::vector<int32_t> block_ids;  // where prompt block first_block + i goes
  bool gives_back = false;         // blocks before first_block, where the peer wants them
  absl::Time deadline;             // the loop's clock
  TraceContext trace;              // the call's place in it, if it has one
  // Told of the progress; and to be sent when the reply arrives, before the loop hears of it.
  std::shared_ptr<FirstToken> first_token;
};

// What a prefill worker answers.
struct PrefillOutcome {
  TokenLogprob first_token;
  std::vector<TokenLogprob> prompt_logprobs;
  int cached_tokens = 0;
  int returned_tokens = 0;  // of those: were given back to it
  absl::Duration queue;
  absl::Duration kv_return;  // until they were, or were not
  absl::Duration prefill;
  uint64_t kv_bytes = 0;
  std::string worker_id;
};

// What came of the call `call_id`.
struct PrefillReply {
  uint64_t call_id = 0;
  absl::StatusOr<PrefillOutcome> outcome = absl::UnknownError("no reply");
  absl::Time at = absl::InfiniteFuture();  // when it arrived; future: as the loop hears of it
  bool sent = false;                       // the first token is with its reader
  bool reached = true;                     // false: the worker never had the call
};

// The worker wants blocks of the prompt of the call `call_id`: target.target_blocks[i] receives
// prompt block first_block + i. Where its pool is reached the route says.
struct BlocksWanted {
  uint64_t call_id = 0;
  kvtransfer::KvSendTarget target;
  int first_block = 0;
};

// Thread-safe. Replies reach the loop through its inbox: exactly one per Call, also after Cancel.
// BlocksWanted may come before it.
class PrefillCaller {
 public:
  virtual ~PrefillCaller() = default;
  // Never blocks.
  virtual void Call(PrefillCall call) = 0;
  // Idempotent; unknown calls are ignored.
  virtual void Cancel(uint64_t call_id) = 0;
};

}  // namespace tandem::decode
