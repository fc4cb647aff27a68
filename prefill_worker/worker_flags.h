// What tandem_prefill_worker says of itself and its flags: to its own command line, and to `tandem
// up`, which hands them on.
#pragma once

#include "common/config/flags.h"
#include "prefill_worker/worker.h"

namespace tandem::prefill {

inline constexpr char kPrefillProgram[] = "tandem_prefill_worker";
inline constexpr char kPrefillSummary[] =
    "Computes prompts in chunks and ships their KV blocks to decode workers.";

// All that a worker takes: those of the engine and of any member of a cluster too. `options` must
// live until the flags are parsed.
void AddWorkerFlags(FlagSet* flags, WorkerOptions* options);

}  // namespace tandem::prefill
