// What comes into the decode loop, as plain values. What goes out are TokenEvents.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "common/base/trace.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::decode {

struct PrefillPeer {
  std::string worker_id;
  std::string address;  // HOST:PORT
  std::string voucher;  // the router's word to it for this worker's KV address
  // HOST:PORT where it takes blocks that this worker holds of the prompt; empty: it computes them.
  std::string return_address;
};

// A validated request.
struct Work {
  uint64_t id = 0;  // unique in the process, growing, never 0
  std::string request_id;
  std::vector<int32_t> tokens;  // 1 to max_model_len - 1 of them
  int prompt_length = 0;        // of `tokens`; what follows was generated elsewhere. 0: all
  engine::SamplingParams sampling;
  std::string cache_salt;
  int priority = 0;                  // higher is scheduled earlier
  bool progress = false;             // the client wants to know how far the prompt is
  std::vector<PrefillPeer> prefill;  // best first; empty: prefill here
  int may_lose = 2;                  // of those, with this prompt; at least 1
  TraceContext trace;                // the caller's place in it; none: it traces nothing
  absl::Time arrived;                // Clock
  absl::Time deadline = absl::InfiniteFuture();
};

}  // namespace tandem::decode
