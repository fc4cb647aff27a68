// How long a step takes, fitted to the steps that were seen: so that a prompt's chunk can be cut
// to what fits beside running sequences.
//
//   milliseconds = c0 + c1 * decode_steps + c2 * decode_positions + c3 * chunk_tokens
//                     + c4 * chunk_pairs,   all c >= 0
//
// c0 is reading the weights, c2 reading keys and values, c3 the products and c4 the attention of a
// chunk. Least squares of the relative error, where older steps count less and less (the last 200
// or so are what counts), by a few sweeps of coordinate descent a step from the last solution: what
// the recent steps say nothing about stays as it was.
//
// Pure values, not thread-safe, no clock.
#pragma once

#include <array>
#include <cstdint>

#include "absl/time/time.h"

namespace tandem::decode {

// What one step computes.
struct StepWork {
  int decode_steps = 0;          // sequences with one token, and each token of a draft
  int64_t decode_positions = 0;  // that these attend to, summed
  int chunk_tokens = 0;          // of longer runs
  int64_t chunk_pairs = 0;       // (token, position that it attends to) of these runs

  // `num_tokens` tokens of one sequence after its first `start`.
  void Add(int start, int num_tokens);
  // The same where they are a decode step and its draft.
  void AddRows(int start, int num_tokens);
};

class StepCost {
 public:
  void Observe(const StepWork& work, absl::Duration took);
  // 0 for a kind of work that was never seen.
  double Milliseconds(const StepWork& work) const;
  // A chunk of more tokens than this is beyond what the seen steps tell: twice the largest seen,
  // and kFirstChunk before any.
  int TrustedChunk() const { return trusted_chunk_; }
  static constexpr int kFirstChunk = 256;

 private:
  static constexpr int kTerms = 5;
  using Terms = std::array<double, kTerms>;
  static Terms TermsOf(const StepWork& work);

  std::array<Terms, kTerms> squares_ = {};  // X^T X of the weighted steps
  Terms targets_ = {};                      // X^T y
  Terms coefficients_ = {};                 // milliseconds per unit
  int trusted_chunk_ = kFirstChunk;
};

}  // namespace tandem::decode
