// What a traffic meets at a cluster of given cards: the real router, schedulers, pools and caches
// of one process under a virtual clock, whose steps and links take as long as the cost model says.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "simulation/cost_model.h"

namespace tandem::simulation {

// How a number of cards is used. A unified worker computes prompts and decodes.
struct Split {
  int prefill = 0;
  int decode = 0;
  int unified = 0;

  std::string Name() const;  // "1P3D", "unified x4"
};
// Every split of `cards`: 1P.., 2P.., ..., unified.
std::vector<Split> SplitsOf(int cards);

// What runs on each card.
struct WorkerPlan {
  int num_blocks = 0;  // of KV
  int block_size = 16;
  int max_model_len = 0;              // tokens
  int max_num_seqs = 256;             // per step
  int max_num_batched_tokens = 8192;  // per step
  absl::Duration target_step = absl::Milliseconds(30);
  int row_tile = 256;
  double link_bytes_per_second = 20e9;
  Host host;  // of all workers
};

// Requests by the time at which they are due.
struct Traffic {
  struct Request {
    absl::Duration due;  // from the start, ascending
    int prompt_tokens = 1;
    int answer_tokens = 1;
  };
  std::vector<Request> requests;
  // The tokens of request i; what prompts share at their beginning is found in the caches.
  std::function<std::vector<int32_t>(size_t i)> prompt;
  int vocab_size = 0;
};

// What became of a request. Times since the start.
struct Answer {
  absl::Duration due;
  std::vector<absl::Duration> arrivals;  // of its tokens
  absl::Duration ended;
  absl::Status status;
  int prompt_tokens = 0;
  int cached_tokens = 0;
};

struct Outcome {
  std::vector<Answer> answers;  // one per request that was measured, in their order
  // While the measured requests were due: tokens that came, of all requests, and requests that
  // ended well.
  double tokens_per_second = 0;
  double requests_per_second = 0;
  absl::Duration simulated;
  double prefill_busy = 0;  // share of it in which cards that only prefill computed
};

// Requests before `first` fill the cluster and those from `last` on keep it full; those between are
// measured, and the simulation ends when they have ended, or when `on_answer`, which hears of each
// of them, says false: then those left count as CANCELLED. The same arguments give the same
// outcome.
struct Window {
  size_t first = 0;
  size_t last = 0;
};
Outcome Serve(const Split& split, const WorkerPlan& worker, const CostModel& cost,
              const ModelWork& model, const Traffic& traffic, const Window& window,
              const std::function<bool(const Answer&)>& on_answer = nullptr);

}  // namespace tandem::simulation
