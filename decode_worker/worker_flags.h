// What tandem_decode_worker says of itself and its flags: to its own command line, and to `tandem
// up`, which hands them on.
#pragma once

#include "common/config/flags.h"
#include "decode_worker/worker.h"

namespace tandem::decode {

inline constexpr char kDecodeProgram[] = "tandem_decode_worker";
inline constexpr char kDecodeSummary[] =
    "Streams tokens under continuous batching, from KV blocks that prefill workers ship or that it "
    "computes itself.";

// All that a worker takes: those of the engine and of any member of a cluster too. `options` must
// live until the flags are parsed.
void AddWorkerFlags(FlagSet* flags, WorkerOptions* options);

}  // namespace tandem::decode
