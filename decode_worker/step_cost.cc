#include "decode_worker/step_cost.h"

#include <algorithm>
#include <cstddef>

namespace tandem::decode {
namespace {

constexpr double kMemory = 0.995;  // weight of a step against the next one's
constexpr int kSweeps = 8;

}  // namespace

void StepWork::Add(int start, int num_tokens) {
  const int64_t n = num_tokens;
  if (n == 1) return AddRows(start, 1);
  chunk_tokens += num_tokens;
  chunk_pairs += n * start + n * (n + 1) / 2;
}

void StepWork::AddRows(int start, int num_tokens) {
  const int64_t n = num_tokens;
  decode_steps += num_tokens;
  decode_positions += n * start + n * (n + 1) / 2;
}

StepCost::Terms StepCost::TermsOf(const StepWork& work) {
  return {1.0, static_cast<double>(work.decode_steps), static_cast<double>(work.decode_positions),
          static_cast<double>(work.chunk_tokens), static_cast<double>(work.chunk_pairs)};
}

void StepCost::Observe(const StepWork& work, absl::Duration took) {
  const double milliseconds = absl::ToDoubleMilliseconds(took);
  if (milliseconds <= 0) return;
  trusted_chunk_ = std::max(trusted_chunk_, 2 * work.chunk_tokens);
  Terms x = TermsOf(work);
  // Divided by what it took, a step's error is relative and its target 1.
  for (double& term : x) term /= milliseconds;
  for (size_t i = 0; i < kTerms; ++i) {
    for (size_t j = 0; j < kTerms; ++j) {
      squares_[i][j] = kMemory * squares_[i][j] + x[i] * x[j];
    }
    targets_[i] = kMemory * targets_[i] + x[i];
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (size_t i = 0; i < kTerms; ++i) {
      if (squares_[i][i] <= 0) continue;
      double rest = targets_[i];
      for (size_t j = 0; j < kTerms; ++j) {
        if (j != i) rest -= squares_[i][j] * coefficients_[j];
      }
      coefficients_[i] = std::max(0.0, rest / squares_[i][i]);
    }
  }
}

double StepCost::Milliseconds(const StepWork& work) const {
  const Terms x = TermsOf(work);
  double sum = 0;
  for (size_t i = 0; i < kTerms; ++i) sum += coefficients_[i] * x[i];
  return sum;
}

}  // namespace tandem::decode
