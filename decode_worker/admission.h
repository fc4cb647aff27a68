// How a request becomes a sequence: room first, then compute.
//
// Not thread-safe: part of the loop.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "common/base/clock.h"
#include "decode_worker/request.h"
#include "decode_worker/scheduler.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"

namespace tandem::decode {

struct AdmissionOptions {
  Limits limits;
  int max_model_len = 0;              // tokens; the pool holds at least one sequence of this length
  bool unified = false;               // prefill everything here
  int local_prefill_max_tokens = 32;  // uncached tokens up to which a prompt is prefilled here
  std::string worker_id;
  std::string cluster_secret;  // with model_digest and a request's salt: the block hash seed
  std::string model_digest;
};

// A sequence that holds what the prefix cache had of its prompt.
struct Admitted {
  std::unique_ptr<Sequence> sequence;
  engine::BlockLease fresh;  // for the rest of the prompt and the next token
  bool ask = false;          // a prefill worker; else the rest is prefilled here
};

class Admission {
 public:
  // All outlive this.
  Admission(AdmissionOptions options, engine::BlockPool* pool, engine::PrefixCache* cache,
            Clock* clock);

  // `work` is valid (decode_wire.h); `view` is what runs now. DEADLINE_EXCEEDED, or
  // RESOURCE_EXHAUSTED where slots or blocks are short: a refused request leaves no trace in pool
  // and cache, and its status says what it lacked (RefusalOf).
  absl::StatusOr<Admitted> Admit(Work work, const View& view);
  // The most blocks that a request may need for Admit to take it now; 0: none is taken.
  int AdmissibleBlocks(const View& view) const;

 private:
  // What the cache has of a prompt, and where the rest is to be computed.
  struct Placement {
    int cached_blocks = 0;
    int idle_blocks = 0;  // of those: held by nobody, so taking them takes from what is available
    bool ask = false;
  };

  Placement Place(const Work& work, const Hash128& seed) const;
  // Whether another prompt may be asked for: not while too much of the pool waits for senders.
  bool MayAsk(const View& view) const;
  // That a prompt computed here without being asked for may need.
  int MostLocalBlocks() const;
  absl::Status CheckRoom(const View& view, const Placement& place, int needed_blocks) const;

  const AdmissionOptions options_;
  engine::BlockPool* const pool_;
  engine::PrefixCache* const cache_;
  Clock* const clock_;
};

}  // namespace tandem::decode
