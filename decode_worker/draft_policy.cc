#include "decode_worker/draft_policy.h"

#include <algorithm>
#include <cmath>

namespace tandem::decode {

double DraftPrice(const StepCost& cost, const StepWork& step, int positions) {
  const double all = cost.Milliseconds(step);
  if (all <= 0) return 0;
  StepWork with_row = step;
  with_row.AddRows(positions - 1, 1);
  return step.decode_steps * (cost.Milliseconds(with_row) - all) / all;
}

size_t DraftPolicy::GradeOf(int evidence) { return evidence < 4 ? 0 : evidence < 8 ? 1 : 2; }

double DraftPolicy::RightShare(int evidence) const {
  const Grade& grade = grades_[GradeOf(evidence)];
  return (grade.right + 1) / (grade.right + grade.wrong + 2);
}

double DraftPolicy::Gain(int evidence, double price, int given, int length) const {
  const double p = RightShare(evidence);
  double gain = 0;
  for (int i = given + 1; i <= length; ++i) gain += std::pow(p, i) - price;
  return gain;
}

int DraftPolicy::Length(int evidence, double price, int most) const {
  const double p = RightShare(evidence);
  int length = 0;
  for (double brings = p; length < most && brings > price; brings *= p) ++length;
  return length;
}

void DraftPolicy::OnVerified(int evidence, int drafted, int accepted) {
  Grade& grade = grades_[GradeOf(evidence)];
  grade.right += accepted;
  // What follows the first wrong token says nothing.
  if (accepted < drafted) ++grade.wrong;
}

void DraftPolicy::OnTokens(int count) {
  const double left = std::pow(1 - kForgets, count);
  for (Grade& grade : grades_) {
    grade.right *= left;
    grade.wrong *= left;
  }
}

}  // namespace tandem::decode
