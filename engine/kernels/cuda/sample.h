// From rows of logits to tokens: Ops::Sample on a GPU (engine/kernels/ops.h has its arguments,
// engine/kernels/cpu/sample.h what each spec asks for). Tokens, statuses and alternatives are those
// of the CPU given equal logits, bit for bit; log probabilities agree to 1e-5.
//
// One launch. A row has a team of blocks, as many as keep the device busy: a cluster, whose blocks
// read each other's shared memory (compute capability 9.0; one block before). Each reads its part
// of the row once for the maximum. That is all for a greedy row. Where few of the most likely
// tokens are wanted (top_k, alternatives) they are found among the maxima of 1024 parts of the row,
// so that it is not read again. A nucleus without top_k takes three more readings, which come from
// L2: a histogram of weights, the tokens of the bin where the nucleus ends, and the draw. Specs are
// read on the device: a launch of the same `count` is the same work whatever they say.
#pragma once

#include <cstddef>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/ops.h"

namespace tandem::engine::cuda {

// Memory that the launches of one stream share. Zeroed before the first; each leaves what it
// counted in as zeros.
size_t SampleScratchBytes(int max_rows, int vocab);

// `vocab`: stride of the logits' rows; `max_rows` as of the scratch. args.count <= max_rows,
// 1 <= args.valid_vocab <= vocab < 2^19.
cudaError_t SampleRows(const SampleArgs& args, int vocab, int max_rows, void* scratch,
                       const LaunchOptions& options);

}  // namespace tandem::engine::cuda
