// One prompt, as the prefill loop holds it. Not thread-safe: owned by the loop.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/trace.h"
#include "common/base/transfer_id.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "prefill_worker/request.h"

namespace tandem::prefill {

enum class Phase {
  kWaiting,    // holds no blocks
  kReturning,  // holds its blocks, some of which its caller writes
  kRunning,    // the prompt is computed chunk by chunk
  kShipping,   // replied; the sender still reads the blocks
};

using TransferKey = std::pair<TransferId, uint64_t>;  // id, epoch

// Blocks on their way back from the caller.
struct Return {
  TransferKey key;
  int first_block = 0;  // of the lease: [first_block, end_block)
  int end_block = 0;
  absl::Time began_at;
  uint64_t bytes_seen = 0;  // of them, at `progressed_at`
  absl::Time progressed_at;
};

struct Sequence {
  Work work;
  Hash128 hash_seed;
  Phase phase = Phase::kWaiting;
  int times_passed = 0;
  engine::PromptMatch known;  // while it waits
  engine::BlockLease lease;
  // In tokens: cached <= computed <= launched. Launched steps compute up to `launched`.
  int cached = 0;
  int computed = 0;
  int launched = 0;
  int pushed_blocks = 0;                // all layers are, or will be, with the sender
  int inserted_blocks = 0;              // known to the prefix cache
  std::unique_ptr<Return> coming_back;  // kReturning only
  bool return_tried = false;
  int returned = 0;  // of `cached`, in tokens
  absl::Duration return_took;
  std::unique_ptr<RequestTrace> trace;        // null: it has no spans
  absl::Time waits_since;                     // for blocks and for its first chunk
  absl::Time started = absl::InfinitePast();  // first chunk
  std::vector<TokenLogprob> prompt_logprobs;

  int length() const { return static_cast<int>(work.tokens.size()); }
  int prompt_length() const { return work.prompt_length > 0 ? work.prompt_length : length(); }
  TransferKey key() const { return {work.target.id, work.target.epoch}; }
  bool has_started() const { return started != absl::InfinitePast(); }
  // Logprobs of prompt tokens exist only where the tokens are computed. At least the last token is
  // computed too: its logits give the first new one.
  int MaxCachedBlocks(int block_size) const {
    return work.sampling.prompt_logprobs >= 0 ? 0 : (length() - 1) / block_size;
  }
};

}  // namespace tandem::prefill
