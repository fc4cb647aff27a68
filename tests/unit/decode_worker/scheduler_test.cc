#include "decode_worker/scheduler.h"

#include <algorithm>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr Limits kLimits{/*block_size=*/4, /*max_num_seqs=*/8, /*max_num_batched_tokens=*/16};

SequenceView Running(int computed, int blocks) {
  return {SequencePhase::kRunnable, computed + 1, computed, blocks, false};
}
SequenceView Prefilling(int length, int computed) {
  return {SequencePhase::kRunnable, length, computed, BlocksFor(length + 1, 4), false};
}
SequenceView Preempted(int length) { return {SequencePhase::kPreempted, length, 0, 0, false}; }
SequenceView Awaiting(int length) {
  return {SequencePhase::kAwaitingPrefill, length, 0, BlocksFor(length + 1, 4), false};
}

std::vector<std::pair<int, int>> Runs(const Plan& plan) {
  std::vector<std::pair<int, int>> out;
  for (const ScheduledRun& run : plan.runs) out.push_back({run.sequence, run.num_tokens});
  return out;
}

TEST(SchedulerTest, EveryRunningSequenceSteps) {
  const Plan plan = NextBatch({{Running(3, 1), Running(4, 1), Running(7, 2)}, 5}, kLimits);
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 1), std::pair(1, 1), std::pair(2, 1)));
  EXPECT_EQ(plan.runs[0].new_blocks, 0);
  EXPECT_EQ(plan.runs[1].new_blocks, 1);  // position 4 opens the second block
  EXPECT_THAT(plan.preempt, IsEmpty());
}

TEST(SchedulerTest, PrefillsShareTheRestOfTheBudget) {
  // 16 tokens: one step, then 15 for three prefills: a quarter for the oldest, the rest to those
  // that have the least left.
  const Plan plan = NextBatch(
      {{Prefilling(100, 0), Running(3, 1), Prefilling(3, 0), Prefilling(50, 20)}, 5}, kLimits);
  EXPECT_THAT(Runs(plan),
              ElementsAre(std::pair(1, 1), std::pair(0, 3), std::pair(2, 3), std::pair(3, 9)));
}

TEST(SchedulerTest, WhoHasHadTokensComesBeforePrompts) {
  SequenceView again = Prefilling(100, 0);
  again.streaming = true;
  const Plan plan = NextBatch({{Prefilling(100, 0), Prefilling(3, 0), again}, 50}, kLimits);
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 4), std::pair(2, 12)));
}

TEST(SchedulerTest, TheYoungestIsPreemptedForTheOldest) {
  const Plan plan = NextBatch({{Running(4, 1), Running(5, 2), Running(9, 3)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, ElementsAre(2));
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 1), std::pair(1, 1)));
  EXPECT_THAT(plan.stalled, IsEmpty());
}

TEST(SchedulerTest, APrefillingYoungestIsPreemptedToo) {
  const Plan plan = NextBatch({{Running(4, 1), Prefilling(9, 4)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, ElementsAre(1));
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 1)));
}

TEST(SchedulerTest, AwaitedBlocksAreNotTaken) {
  // Nothing younger can be taken: the sequence keeps its blocks and waits.
  const Plan plan = NextBatch({{Running(4, 1), Awaiting(9)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, IsEmpty());
  EXPECT_THAT(plan.runs, IsEmpty());
  EXPECT_THAT(plan.stalled, ElementsAre(0));
}

TEST(SchedulerTest, TheYoungestItselfStallsRatherThanTakeFromTheOlder) {
  const Plan plan = NextBatch({{Running(5, 2), Running(4, 1)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, IsEmpty());
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 1)));
  EXPECT_THAT(plan.stalled, ElementsAre(1));
}

TEST(SchedulerTest, PausedSequencesAreSkippedButGiveTheirBlocks) {
  SequenceView paused = Running(9, 3);
  paused.paused = true;
  EXPECT_THAT(NextBatch({{paused}, 4}, kLimits).runs, IsEmpty());
  EXPECT_THAT(NextBatch({{Running(4, 1), paused}, 0}, kLimits).preempt, ElementsAre(1));
}

TEST(SchedulerTest, ResumesOldestFirstWithRoomForTheOthers) {
  // 7 tokens and the next: 2 blocks, and one for each holder.
  EXPECT_THAT(NextBatch({{Running(5, 2), Preempted(7)}, 2}, kLimits).resume, IsEmpty());
  EXPECT_THAT(NextBatch({{Running(5, 2), Preempted(7)}, 3}, kLimits).resume, ElementsAre(1));
  EXPECT_THAT(NextBatch({{Preempted(7)}, 2}, kLimits).resume, ElementsAre(0));
  // A younger one never passes an older one that does not fit yet.
  EXPECT_THAT(NextBatch({{Preempted(40), Preempted(3)}, 5}, kLimits).resume, IsEmpty());
}

// ---- with drafts ----

SequenceView Drafting(int computed, int blocks, int draft) {
  SequenceView view = Running(computed, blocks);
  view.draft = draft;
  return view;
}

TEST(SchedulerTest, ADraftIsComputedWithItsDecodeStep) {
  const Plan plan = NextBatch({{Drafting(3, 1, 5), Running(4, 2)}, 9}, kLimits);
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 6), std::pair(1, 1)));
  EXPECT_EQ(plan.runs[0].drafted, 5);
  EXPECT_EQ(plan.runs[0].new_blocks, 2);  // positions 3 to 8
  EXPECT_EQ(plan.runs[1].drafted, 0);
}

TEST(SchedulerTest, DraftsLeaveHalfOfTheBudgetToPrompts) {
  const Plan plan =
      NextBatch({{Drafting(3, 9, 5), Drafting(3, 9, 5), Prefilling(100, 0)}, 9}, kLimits);
  // 16 tokens: two decode steps, then 7 of 14 for drafts.
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 6), std::pair(1, 3), std::pair(2, 7)));
}

TEST(SchedulerTest, DraftsTakeNoBlockThatOthersMayNeedNext) {
  // A block for each of the two is left, whatever the draft would take.
  EXPECT_EQ(NextBatch({{Drafting(3, 1, 5), Running(4, 2)}, 2}, kLimits).runs[0].num_tokens, 1);
  EXPECT_EQ(NextBatch({{Drafting(2, 1, 5), Running(4, 2)}, 2}, kLimits).runs[0].num_tokens, 2);
  const Plan plan = NextBatch({{Drafting(3, 1, 5), Running(4, 2)}, 3}, kLimits);
  EXPECT_EQ(plan.runs[0].num_tokens, 5);
  EXPECT_EQ(plan.runs[0].new_blocks, 1);
}

TEST(SchedulerTest, NobodyIsPreemptedBesideADraft) {
  const Plan plan = NextBatch({{Drafting(2, 1, 1), Running(4, 1), Running(9, 3)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, ElementsAre(2));
  EXPECT_EQ(plan.runs[0].drafted, 0);
}

// ---- with a step in flight ----

// A sequence whose next token the step in flight draws.
SequenceView Pending(int computed, int blocks, int max_length = 1 << 30) {
  SequenceView view = Running(computed, blocks);
  view.token_pending = view.in_flight = true;
  view.max_length = max_length;
  return view;
}

TEST(SchedulerTest, APendingTokenIsComputedLikeAnyOther) {
  const Plan plan = NextBatch({{Pending(3, 1), Pending(4, 1)}, 5}, kLimits);
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(0, 1), std::pair(1, 1)));
  EXPECT_EQ(plan.runs[1].new_blocks, 1);
}

TEST(SchedulerTest, ASequenceThatEndsWithItsPendingTokenIsNotComputedFurther) {
  const Plan plan = NextBatch({{Pending(3, 1, 4), Pending(3, 1, 5)}, 5}, kLimits);
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(1, 1)));
  EXPECT_THAT(plan.stalled, IsEmpty());
}

TEST(SchedulerTest, BlocksThatComeBackSoonSpareAPreemption) {
  // The first two need a block each, and one is on its way: the youngest pays for the second only.
  const View view = {{Pending(4, 1), Pending(8, 2), Pending(5, 2), Pending(5, 2)}, 0, 1};
  const Plan plan = NextBatch(view, kLimits);
  EXPECT_THAT(plan.stalled, ElementsAre(0, 1));
  EXPECT_THAT(plan.preempt, ElementsAre(3));
  EXPECT_THAT(Runs(plan), ElementsAre(std::pair(2, 1)));
}

TEST(SchedulerTest, BlocksOfASequenceInFlightAreNotThereYet) {
  const Plan plan = NextBatch({{Pending(4, 1), Pending(9, 3)}, 0}, kLimits);
  EXPECT_THAT(plan.preempt, ElementsAre(1));
  EXPECT_THAT(plan.stalled, ElementsAre(0));  // for one step
  EXPECT_THAT(plan.runs, IsEmpty());
}

TEST(SchedulerTest, AdmitsWhatFitsAndNothingWhileOthersWait) {
  const auto admit = [](View view, int needed, int total = 10) {
    return needed <= AdmissibleBlocks(view, total, kLimits);
  };
  EXPECT_TRUE(admit({{}, 10}, 10));
  EXPECT_FALSE(admit({{}, 9}, 10));
  EXPECT_FALSE(admit({std::vector<SequenceView>(8, Running(5, 2)), 10}, 1));
  EXPECT_FALSE(admit({{Preempted(3)}, 9}, 1));
  EXPECT_FALSE(admit({{Running(4, 1), Awaiting(9)}, 0}, 1));
  // The running one takes a block next.
  EXPECT_FALSE(admit({{Running(4, 1)}, 3}, 3));
  EXPECT_TRUE(admit({{Running(4, 1)}, 3}, 2));
  // One percent stays free, unless the worker is idle.
  EXPECT_FALSE(admit({{Running(5, 2)}, 100}, 100, 300));
  EXPECT_TRUE(admit({{Running(5, 2)}, 100}, 97, 300));
  EXPECT_TRUE(admit({{}, 100}, 100, 300));
}

// Plays plans against a counted pool: whatever comes, limits hold and everybody finishes.
class Play {
 public:
  explicit Play(uint32_t seed) : random_(seed) {
    limits_.block_size = 1 << Below(4);
    limits_.max_num_seqs = 1 + Below(8);
    limits_.max_num_batched_tokens = limits_.max_num_seqs + Below(20);
    total_ = BlocksFor(kMaxLength, limits_.block_size) + Below(6);
    view_.free_blocks = total_;
  }

  void Run() {
    int turns = 0;
    while (arrivals_ < 30 || !view_.sequences.empty()) {
      ASSERT_LT(++turns, 20000) << "livelock with " << view_.sequences.size() << " sequences";
      if (arrivals_ < 30 && Below(3) == 0) Arrive();
      Drift();
      Apply(NextBatch(view_, limits_));
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_EQ(view_.free_blocks, total_);
  }
  int preempted() const { return preempted_; }

 private:
  static constexpr int kMaxLength = 40;
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }

  void Arrive() {
    const int length = 1 + Below(kMaxLength - 2);
    const int blocks = BlocksFor(length + 1, limits_.block_size);
    if (blocks > AdmissibleBlocks(view_, total_, limits_)) return;
    ++arrivals_;
    view_.free_blocks -= blocks;
    const bool away = Below(2) == 0;
    view_.sequences.push_back({away ? SequencePhase::kAwaitingPrefill : SequencePhase::kRunnable,
                               length, 0, blocks, false});
    ends_.push_back(length + 1 + Below(kMaxLength - length));
    ASSERT_LE(static_cast<int>(view_.sequences.size()), limits_.max_num_seqs);
  }

  // Prefills come in, readers fall behind and catch up.
  void Drift() {
    for (SequenceView& s : view_.sequences) {
      if (s.phase == SequencePhase::kAwaitingPrefill && Below(4) == 0) {
        s.phase = SequencePhase::kRunnable;
        s.computed = s.length++;
      }
      if (Below(10) == 0) s.paused = !s.paused;
    }
  }

  void Apply(const Plan& plan) {
    for (int i : plan.preempt) {
      SequenceView& s = view_.sequences[static_cast<size_t>(i)];
      ASSERT_EQ(s.phase, SequencePhase::kRunnable);
      ++preempted_;
      view_.free_blocks += s.blocks;
      s.blocks = s.computed = 0;
      s.phase = SequencePhase::kPreempted;
    }
    int tokens = 0;
    for (const ScheduledRun& run : plan.runs) {
      SequenceView& s = view_.sequences[static_cast<size_t>(run.sequence)];
      ASSERT_EQ(s.phase, SequencePhase::kRunnable);
      ASSERT_FALSE(s.paused);
      ASSERT_GT(run.num_tokens, 0);
      tokens += run.num_tokens;
      view_.free_blocks -= run.new_blocks;
      s.blocks += run.new_blocks;
      s.computed += run.num_tokens;
      ASSERT_LE(s.computed, s.length);
      ASSERT_LE(s.computed, s.blocks * limits_.block_size);
      // Nobody was preempted for the sake of a younger one.
      for (int i : plan.preempt) ASSERT_TRUE(run.new_blocks == 0 || i > run.sequence);
      if (s.computed == s.length) ++s.length;
    }
    ASSERT_LE(tokens, limits_.max_num_batched_tokens);
    for (int i : plan.resume) {
      SequenceView& s = view_.sequences[static_cast<size_t>(i)];
      ASSERT_EQ(s.phase, SequencePhase::kPreempted);
      s.blocks = BlocksFor(s.length + 1, limits_.block_size);
      view_.free_blocks -= s.blocks;
      s.phase = SequencePhase::kRunnable;
    }
    ASSERT_GE(view_.free_blocks, 0);
    for (size_t i = view_.sequences.size(); i-- > 0;) {
      if (view_.sequences[i].length < ends_[i]) continue;
      view_.free_blocks += view_.sequences[i].blocks;
      view_.sequences.erase(view_.sequences.begin() + static_cast<ptrdiff_t>(i));
      ends_.erase(ends_.begin() + static_cast<ptrdiff_t>(i));
    }
  }

  std::mt19937 random_;
  Limits limits_;
  View view_;
  std::vector<int> ends_;  // length at which a sequence is done
  int total_ = 0;
  int arrivals_ = 0;
  int preempted_ = 0;
};

TEST(SchedulerTest, LimitsHoldAndEverybodyFinishes) {
  int preempted = 0;
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    Play play(seed);
    play.Run();
    if (HasFatalFailure()) return;
    preempted += play.preempted();
  }
  EXPECT_GT(preempted, 300);
}

}  // namespace
}  // namespace tandem::decode
