// Which sequences the decode worker computes next. Pure functions over values: no clock, pool,
// model, gRPC or metrics.
//
// A sequence has `length` tokens (prompt and generated), of which `computed` have KV in its blocks
// or will have it when the steps in flight are over. One token to compute is a decode step; more
// are a prefill that is cut into chunks. Both draw the next token when they reach the end.
//
// While a step is in flight that draws a sequence's next token, this token is pending: it counts
// into the sequence's length, for the next step can compute it without anybody on the host having
// seen it. Only what the host knows for certain ends a sequence here: one whose pending token is
// its last by number is not computed further; one that a stop token ends may be computed one step
// too far, and the loop drops what comes of it.
//
// The rule, over sequences in order (oldest first, see View):
//   1. Every runnable sequence with one token to compute gets its decode step. If it needs one
//      block more and none is free, but blocks come back when a step in flight is over, it waits
//      for them. Else the youngest younger sequence that holds blocks is preempted (its blocks are
//      freed, it is recomputed later from its tokens), and so on until the block is there. If there
//      is no younger one, the sequence stalls: it keeps its blocks and skips this batch.
//      Where it has a draft, as much of it is computed along as half of what is left of the token
//      budget holds, and as free blocks do when one is left to every sequence: guesses take nothing
//      from anybody, and none are computed where anybody stalls or is preempted.
//   2. Prefills share what is left of the token budget as on a prefill worker (prompt_batch.h of
//      worker/); those that are computed again and have drawn tokens before go first. Beside
//      decode steps, and where there is a Pace, the budget is also cut to what keeps the step
//      within its time, but never below kLeastChunk: prompts go on, however slowly.
//   3. A preempted sequence is resumed, oldest first and never past an older one that waits, when
//      the free blocks hold all its tokens, the next one, and one block for every sequence that
//      holds blocks now (so that it is not preempted again at once).
//
// Why there is no livelock: nobody ever takes a block from an older sequence, so the oldest
// sequence with blocks can always get all blocks except those of sequences whose prefill is awaited
// elsewhere; those waits are bounded, and while anyone stalls or waits for blocks nobody new is
// admitted (AdmissibleBlocks).
#pragma once

#include <vector>

#include "common/base/kv_layout.h"
#include "decode_worker/step_cost.h"

namespace tandem::decode {

struct Limits {
  int block_size = 16;                // tokens
  int max_num_seqs = 64;              // sequences admitted, in any phase
  int max_num_batched_tokens = 2048;  // per batch; >= max_num_seqs, so that every decode step fits
};

// How long a step may take while sequences wait for its tokens.
struct Pace {
  double target_ms = 0;
  // Products compute rows in tiles of so many, and a tile that is not full takes as long as one
  // that is: so a batch of more rows is cut to a multiple.
  int row_tile = 1;
  StepCost cost;
};
inline constexpr int kLeastChunk = 16;  // tokens, of all chunks of a batch

enum class SequencePhase {
  kAwaitingPrefill,  // a prefill worker computes it; its blocks cannot be taken
  kRunnable,         // holds the blocks of `computed` tokens and maybe more
  kPreempted,        // holds no blocks
};

struct SequenceView {
  SequencePhase phase = SequencePhase::kRunnable;
  int length = 0;              // tokens, >= 1; a pending one is counted
  int computed = 0;            // < length; with what launched steps compute
  int blocks = 0;              // held
  bool paused = false;         // its reader is slow: not computed, may be preempted
  bool token_pending = false;  // the last of `length` is known to the device only
  bool in_flight = false;      // a launched step computes it: blocks taken from it come back later
  int max_length = 1 << 30;    // it ends when it has so many tokens
  bool streaming = false;      // somebody waits for its next token, who has had some
  int draft = 0;               // tokens that may follow the last: at most max_length - length - 1
};

struct View {
  std::vector<SequenceView> sequences;  // oldest first
  int free_blocks = 0;                  // that the pool could hand out now
  int returning_blocks = 0;             // that come back when the steps in flight are over
};

struct ScheduledRun {
  int sequence = 0;    // index into the view
  int num_tokens = 0;  // where a token is pending: 1, and it is this token
  int drafted = 0;     // of num_tokens, the last: a draft's
  int new_blocks = 0;  // to reserve first
};

struct Plan {
  std::vector<int> preempt;  // indices, in this order, before anything else
  std::vector<ScheduledRun> runs;
  std::vector<int> resume;   // indices, in this order; they take part from the next batch on
  std::vector<int> stalled;  // would have run had there been blocks
};

// An estimate where blocks are shared: preempting a sequence may free fewer blocks than it holds.
// The caller then cannot reserve for some run, leaves it out, and asks again. `pace` null: chunks
// are cut by the token budget alone.
Plan NextBatch(const View& view, const Limits& limits, const Pace* pace = nullptr);

// How many blocks a new sequence may need (prompt blocks not cached, and room to grow), of a pool
// of `total_blocks`; 0: none may come in. One percent of the pool, and what the next batch will
// take, is left to those already running. Nobody comes in while anyone stalls or is preempted.
int AdmissibleBlocks(const View& view, int total_blocks, const Limits& limits);

}  // namespace tandem::decode
