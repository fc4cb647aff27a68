// What a benchmark sends: conversations, whose prompts are made of named pieces of tokens.
//
// Pure. A piece holds the same tokens wherever its name stands, and others than every other piece:
// prompts share exactly the prefix over which their pieces are the same.
#pragma once

#include <cstdint>
#include <vector>

#include "cli/bench/trace.h"

namespace tandem::cli {

struct Piece {
  uint64_t name = 0;
  int tokens = 0;
};

// One request: its prompt is all that was said before, answers included, and then these pieces.
struct Turn {
  std::vector<Piece> pieces;
  int output_tokens = 0;
};

struct Conversation {
  double at_s = 0;  // due so long after the start, in an open loop
  std::vector<Turn> turns;

  // Tokens of the longest prompt and its answer.
  int64_t Length() const;
};

// Lengths are drawn evenly from [1 - range_ratio, 1 + range_ratio] times what is given.
struct Lengths {
  int input = 1024;
  int output = 128;
  double range_ratio = 0;  // [0, 1)
  uint64_t seed = 0;
};

// Single turns with `prefix` tokens, the same for all that share one of `num_prefixes` prefixes, in
// front of input tokens that nobody shares.
std::vector<Conversation> RandomWorkload(int count, const Lengths& lengths, int prefix = 0,
                                         int num_prefixes = 1);

// A first turn of `first` new tokens, answered, and a second one of `second` tokens more.
std::vector<Conversation> TwoTurnWorkload(int count, int first, int second, const Lengths& lengths);

struct TraceReplay {
  int block_tokens = 512;   // what one hash id stands for
  double speed = 1;         // > 0; 2: in half the time
  double length_scale = 1;  // > 0; of inputs, outputs and blocks alike
};
// Equal hash ids become equal blocks of tokens, so that prefixes are shared as in the trace.
std::vector<Conversation> TraceWorkload(const std::vector<TraceEntry>& trace,
                                        const TraceReplay& replay);

// Appends the piece's tokens, each in [0, vocab_size).
void AppendTokens(const Piece& piece, uint64_t seed, uint32_t vocab_size,
                  std::vector<uint32_t>* out);

}  // namespace tandem::cli
