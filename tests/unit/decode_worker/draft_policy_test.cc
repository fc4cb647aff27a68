#include "decode_worker/draft_policy.h"

#include <random>

#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

constexpr int kWeak = 2, kStrong = 20;
constexpr int kMost = 16;

// A machine whose steps take so many milliseconds, and each row so much more.
StepCost CostOf(double step_ms, double row_ms) {
  StepCost cost;
  for (int i = 0; i < 400; ++i) {
    StepWork work;
    work.AddRows(100, 1 + i % 8);
    cost.Observe(work, absl::Milliseconds(step_ms + row_ms * (1 + i % 8)));
  }
  return cost;
}

StepWork StepOf(int sequences) {
  StepWork work;
  for (int i = 0; i < sequences; ++i) work.AddRows(100, 1);
  return work;
}

TEST(DraftPriceTest, IsWhatTheStepWouldBringInTheTimeOfARow) {
  const StepCost cost = CostOf(9, 1);
  EXPECT_NEAR(DraftPrice(cost, StepOf(1), 101), 0.1, 0.02);  // 1 of 10 ms for one token
  EXPECT_NEAR(DraftPrice(cost, StepOf(9), 101), 0.5, 0.05);  // 1 of 18 ms for nine
  EXPECT_LT(DraftPrice(CostOf(20, 0.1), StepOf(1), 101), 0.02);
}

TEST(DraftPriceTest, IsNothingBeforeStepsWereSeen) {
  EXPECT_EQ(DraftPrice(StepCost(), StepOf(3), 10), 0);
}

TEST(DraftPolicyTest, DraftsAsFarAsTokensPay) {
  const DraftPolicy unknown;  // every other one is taken to be right
  EXPECT_EQ(unknown.Length(kWeak, 0.6, kMost), 0);
  EXPECT_EQ(unknown.Length(kWeak, 0.3, kMost), 1);
  EXPECT_EQ(unknown.Length(kWeak, 0.1, kMost), 3);
  EXPECT_EQ(unknown.Length(kWeak, 0, kMost), kMost);
}

TEST(DraftPolicyTest, TheGainIsWhatTokensBringAboveTheirPrice) {
  const DraftPolicy unknown;
  EXPECT_DOUBLE_EQ(unknown.Gain(kWeak, 0.1, 0, 3), 0.5 + 0.25 + 0.125 - 3 * 0.1);
  EXPECT_DOUBLE_EQ(unknown.Gain(kWeak, 0.1, 1, 3), 0.25 + 0.125 - 2 * 0.1);
  EXPECT_EQ(unknown.Gain(kWeak, 0.1, 1, 1), 0);
}

TEST(DraftPolicyTest, WhatWasRightMakesDraftsLongerAndWhatWasWrongShorter) {
  DraftPolicy policy;
  for (int i = 0; i < 20; ++i) policy.OnVerified(kStrong, 4, 4);
  for (int i = 0; i < 20; ++i) policy.OnVerified(kWeak, 4, 0);
  EXPECT_EQ(policy.Length(kStrong, 0.3, kMost), kMost);
  EXPECT_EQ(policy.Length(kWeak, 0.3, kMost), 0);
}

TEST(DraftPolicyTest, OnlyTheFirstWrongTokenCounts) {
  DraftPolicy one, all;
  one.OnVerified(kStrong, 1, 0);
  all.OnVerified(kStrong, 16, 0);
  for (double price = 0.01; price < 1; price += 0.01) {
    EXPECT_EQ(one.Length(kStrong, price, kMost), all.Length(kStrong, price, kMost));
  }
}

TEST(DraftPolicyTest, TriesAgainAfterAWhile) {
  DraftPolicy policy;
  for (int i = 0; i < 10; ++i) policy.OnVerified(kWeak, 1, 0);
  EXPECT_EQ(policy.Length(kWeak, 0.2, kMost), 0);
  policy.OnTokens(2000);
  EXPECT_GE(policy.Length(kWeak, 0.2, kMost), 1);
}

// An answer whose drafts are never right loses little, whatever a row costs.
TEST(DraftPolicyTest, WrongDraftsCostLittle) {
  for (const double price : {0.02, 0.1, 0.3, 0.49}) {
    DraftPolicy policy;
    std::mt19937 random(1);
    const int tokens = 4000;
    double rows = 0;
    for (int i = 0; i < tokens; ++i) {
      const int evidence = 2 + static_cast<int>(random() % 8);  // agrees by chance, always
      const int length = policy.Length(evidence, price, kMost);
      if (length > 0) policy.OnVerified(evidence, length, 0);
      policy.OnTokens(1);
      rows += length;
    }
    EXPECT_LT(rows * price / tokens, 0.03) << "price " << price;
  }
}

// One that quotes is drafted nearly whole.
TEST(DraftPolicyTest, RightDraftsAreLong) {
  DraftPolicy policy;
  int steps = 0;
  for (int tokens = 0; tokens < 1000; ++steps) {
    const int length = policy.Length(kStrong, 0.1, kMost);
    if (length > 0) policy.OnVerified(kStrong, length, length);
    policy.OnTokens(length + 1);
    tokens += length + 1;
  }
  EXPECT_LT(steps, 1000 / kMost + 20);
}

}  // namespace
}  // namespace tandem::decode
