// What one forward pass computes, and what comes out. Values and views only: no ownership, no
// project state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"

#include "common/base/token_event.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::engine {

using tandem::TokenLogprob;

// A launched step: 1, 2, ... in the order of launching. 0 names none.
using StepId = uint64_t;

// The token that item `item` of step `step` draws, while the host does not know it yet.
struct DrawnToken {
  StepId step = 0;
  int item = 0;
};

// A run of consecutive tokens of one sequence: a chunk of a prompt, or one decode step.
struct BatchItem {
  // Tokens of the sequence from its beginning, at least up to the end of this run; those in [start,
  // start + num_tokens) are computed now, KV of the first `start` already lies in the blocks. The
  // history is given because penalties need it. Where a token is drawn the sequence ends with the
  // run; a chunk whose prompt_logprobs are asked for also needs the prompt token that follows it.
  std::span<const int32_t> tokens;
  int start = 0;
  int num_tokens = 0;
  int prompt_length = 0;  // tokens[0, prompt_length) are the prompt; the rest were generated
  // Pool blocks of the sequence in order: block_table[i] holds positions [i * block_size, (i + 1) *
  // block_size). Covers at least start + num_tokens positions.
  std::span<const int32_t> block_table;
  // Draw the token that follows the sequence's last: set for decode steps and for a prompt's last
  // chunk; null: no token.
  const SamplingParams* sampling = nullptr;
  // >= 0: logprobs of the prompt tokens computed in this run (position start + 1 .. start +
  // num_tokens, as far as they lie in the prompt), with that many alternatives.
  int prompt_logprobs = -1;
  // Where the step is not 0, the sequence has one token more than `tokens`: this one. It is the
  // run's last. The step is the one launched just before this batch, and the item draws a token.
  DrawnToken pending;
  // Tokens that are guessed to follow `tokens`: they end the run, which computes at least one token
  // before them. A token is drawn in front of each of them and behind the last, and what comes of
  // it is ItemOutput::further. Not together with a pending token, nor can the token of this item be
  // pending in the next batch: nobody knows yet where it stands.
  std::span<const int32_t> draft;

  // Tokens of the sequence, the pending one and the draft included.
  int length() const {
    return static_cast<int>(tokens.size() + draft.size()) + (pending.step != 0 ? 1 : 0);
  }
  // The token at `position`, which is not the pending one.
  int32_t At(int position) const {
    const size_t p = static_cast<size_t>(position);
    return p < tokens.size() ? tokens[p] : draft[p - tokens.size()];
  }
};

struct Batch {
  std::vector<BatchItem> items;
  // Whether the launched step gives an event for each layer (see LaunchedStep).
  bool wants_layer_events = false;

  int NumTokens() const {
    int total = 0;
    for (const BatchItem& item : items) total += item.num_tokens;
    return total;
  }
};

// One per batch item, in order.
struct ItemOutput {
  // Not OK: this sequence's numbers are broken (see sampler.h) and neither its output nor its KV
  // may be used. The other items of the batch stand.
  absl::Status status;
  bool has_token = false;
  TokenLogprob token;  // logprob and top only where asked for
  // What follows it as far as the draft was right: further[i] was drawn behind the draft's first
  // i + 1 tokens, each of which was drawn itself. The KV of these is that of the sequence; what was
  // written for the rest of the draft is to be written again.
  std::vector<TokenLogprob> further;
  // prompt_logprobs[i] belongs to prompt position start + 1 + i.
  std::vector<TokenLogprob> prompt_logprobs;
};

struct StepOutput {
  std::vector<ItemOutput> items;
};

}  // namespace tandem::engine
