// How a request becomes a sequence: room first, then compute.
//
// Not thread-safe: part of the loop.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "common/base/block_hash.h"
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

// Where a prompt is computed, and what that takes.
struct Placement {
  Hash128 seed;
  int cached_blocks = 0;  // that the prefix cache has, and which are used
  int idle_blocks = 0;    // of those: held by nobody, so taking them takes from what is available
  int needed_blocks = 0;  // for the rest of the prompt and the next token
  int tokens = 0;         // to compute
  int max_length = 0;     // of the sequence, in tokens
  bool ask = false;       // a prefill worker computes it; else this one does
};

// What requests will need that hold nothing yet (PrefillBacklog).
struct Promised {
  int sequences = 0;
  int blocks = 0;
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

  // `work` is valid (decode_wire.h). Costs nothing: pool and cache stay as they are.
  Placement Place(const Work& work) const;
  // RESOURCE_EXHAUSTED where slots or blocks are short beside what is `promised` to others; the
  // status says what is lacking (RefusalOf). `view` is what runs now.
  absl::Status CheckRoom(const View& view, const Placement& place, const Promised& promised) const;
  // Takes what `place`, of now, says; the room is there.
  absl::StatusOr<Admitted> Admit(Work work, const Placement& place);
  // The most blocks that a request may need to find room now; 0: none finds any.
  int AdmissibleBlocks(const View& view, const Promised& promised) const;

 private:
  int RoomFor(const View& view, const Promised& promised) const;
  // Whether another prompt may be asked for: not while too much of the pool waits for senders.
  bool MayAsk(const View& view) const;
  // That a prompt computed here without being asked for may need.
  int MostLocalBlocks() const;

  const AdmissionOptions options_;
  engine::BlockPool* const pool_;
  engine::PrefixCache* const cache_;
  Clock* const clock_;
};

}  // namespace tandem::decode
