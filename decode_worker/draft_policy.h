// How many tokens of a draft a sequence has computed ahead. Pure values: no clock, no model.
//
// A drafted token is one more row in the step. The row pays where the tokens that it is expected to
// bring are more than the step would bring without it in the time that the row takes: that is the
// row's price, in tokens.
//
// The i-th token of a draft brings a token if it and all before it are right: p^i, where p is how
// often the sequence's drafts were right so far. Right and wrong are counted apart for weak, fair
// and strong evidence, since two tokens may agree by chance in any text, and eight do not. What was
// seen counts less with every token, and what is not known is taken for 1/2. So a sequence whose
// drafts do not pay has ever fewer of them, and tries again one token of a draft now and then: at
// equilibrium tries cost it the share of kForgets per grade, whatever the price.
#pragma once

#include <array>
#include <cstddef>

#include "decode_worker/step_cost.h"

namespace tandem::decode {

// The price of a row that attends to `positions` positions, beside what `step` computes, in which
// every decode step draws a token. 0 while steps were not seen.
double DraftPrice(const StepCost& cost, const StepWork& step, int positions);

// Of one sequence.
class DraftPolicy {
 public:
  static constexpr double kForgets = 0.004;  // of what is known, per token

  // The longest draft of this evidence whose every token pays, at most `most` tokens.
  int Length(int evidence, double price, int most) const;
  // What these tokens are expected to bring above their price, but for the first `given`, whose
  // rows are computed anyway.
  double Gain(int evidence, double price, int given, int length) const;
  // Of a draft it is known of so many tokens whether they were right, and so many of them were.
  void OnVerified(int evidence, int drafted, int accepted);
  // The sequence has so many tokens more.
  void OnTokens(int count);

 private:
  struct Grade {
    double right = 0, wrong = 0;
  };
  static size_t GradeOf(int evidence);
  // How often a token of a draft is right, when those before it are.
  double RightShare(int evidence) const;

  std::array<Grade, 3> grades_;
};

}  // namespace tandem::decode
