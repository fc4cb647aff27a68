#include "decode_worker/scheduler.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "worker/prompt_batch.h"

namespace tandem::decode {
namespace {

// The plan under construction.
class Planner {
 public:
  Planner(const View& view, const Limits& limits, const Pace* pace)
      : view_(view),
        limits_(limits),
        pace_(pace),
        free_(view.free_blocks),
        returning_(view.returning_blocks),
        budget_(limits.max_num_batched_tokens),
        youngest_(Count()) {}

  Plan Make() {
    for (int i = 0; i < Count(); ++i) {
      if (CanRun(i) && Remaining(i) == 1) AddDecodeStep(i);
    }
    if (plan_.stalled.empty() && plan_.preempt.empty()) AddDrafts();
    AddChunks();
    // Whoever waits for a block comes before those that wait to come back.
    if (plan_.stalled.empty() && plan_.preempt.empty()) AddResumed();
    return std::move(plan_);
  }

 private:
  int Count() const { return static_cast<int>(view_.sequences.size()); }
  const SequenceView& At(int i) const { return view_.sequences[static_cast<size_t>(i)]; }
  int Remaining(int i) const { return At(i).length - At(i).computed; }
  // Sequences from youngest_ on have been preempted or hold nothing that can be taken.
  bool CanRun(int i) const {
    return i < youngest_ && At(i).phase == SequencePhase::kRunnable && !At(i).paused &&
           !EndsWithPendingToken(i);
  }
  bool EndsWithPendingToken(int i) const {
    return At(i).token_pending && At(i).length >= At(i).max_length;
  }

  void AddDecodeStep(int i) {
    const int needed =
        std::max(0, BlocksFor(At(i).computed + 1, limits_.block_size) - At(i).blocks);
    while (needed > free_ + returning_ && PreemptYoungestAfter(i)) {
    }
    if (needed > free_ || budget_ == 0) {
      // What comes back later is spoken for, or every stalled sequence would count on the same
      // blocks and nobody would be preempted for the others.
      returning_ -= std::clamp(needed - free_, 0, returning_);
      plan_.stalled.push_back(i);
      return;
    }
    free_ -= needed;
    --budget_;
    plan_.runs.push_back({.sequence = i, .num_tokens = 1, .new_blocks = needed});
  }

  // To the decode steps, which are all that is planned so far.
  void AddDrafts() {
    int left = budget_ / 2;
    for (ScheduledRun& run : plan_.runs) {
      const SequenceView& sequence = At(run.sequence);
      const int spare = std::max(0, free_ - Count());
      const int room = (sequence.blocks + run.new_blocks + spare) * limits_.block_size;
      run.drafted = std::clamp(std::min(left, room - sequence.computed - 1), 0, sequence.draft);
      if (run.drafted == 0) continue;
      run.num_tokens += run.drafted;
      left -= run.drafted;
      budget_ -= run.drafted;
      const int needed = std::max(
          0, BlocksFor(sequence.computed + run.num_tokens, limits_.block_size) - sequence.blocks);
      free_ -= needed - run.new_blocks;
      run.new_blocks = needed;
    }
  }

  bool PreemptYoungestAfter(int i) {
    while (youngest_ > i + 1) {
      const SequenceView& victim = At(--youngest_);
      if (victim.phase != SequencePhase::kRunnable || victim.blocks == 0) continue;
      (victim.in_flight ? returning_ : free_) += victim.blocks;
      plan_.preempt.push_back(youngest_);
      return true;
    }
    return false;
  }

  void AddChunks() {
    std::vector<int> prefills;
    for (int i = 0; i < Count(); ++i) {
      if (CanRun(i) && Remaining(i) > 1) prefills.push_back(i);
    }
    if (prefills.empty() || budget_ == 0) return;
    const worker::PromptOrder order = OrderOf(prefills);
    // A chunk never needs more blocks than the sequence got when it was admitted or resumed.
    for (const worker::PromptChunk& chunk : Share(order, PacedBudget(prefills, order))) {
      plan_.runs.push_back({.sequence = prefills[static_cast<size_t>(chunk.prompt)],
                            .num_tokens = chunk.num_tokens});
    }
  }

  worker::PromptOrder OrderOf(const std::vector<int>& prefills) const {
    std::vector<worker::PromptView> prompts;
    prompts.reserve(prefills.size());
    for (int i : prefills) {
      prompts.push_back({.remaining = Remaining(i),
                         .priority = At(i).streaming ? 1 : 0,
                         .arrival = static_cast<uint64_t>(i)});
    }
    return worker::PromptOrder(prompts);
  }

  // `budget` >= 1; chunks name indices into what `order` was made of.
  std::vector<worker::PromptChunk> Share(const worker::PromptOrder& order, int budget) const {
    return order.Share({.max_num_batched_tokens = budget, .max_num_seqs = Count()});
  }

  // The most tokens with which the step stays within its time. What a step takes grows with every
  // token, so bisection finds it.
  int PacedBudget(const std::vector<int>& prefills, const worker::PromptOrder& order) const {
    if (pace_ == nullptr || plan_.runs.empty()) return budget_;
    StepWork decode_steps;
    for (const ScheduledRun& run : plan_.runs) {
      decode_steps.AddRows(At(run.sequence).computed, run.num_tokens);
    }
    const auto fits = [&](int budget) {
      StepWork work = decode_steps;
      for (const worker::PromptChunk& chunk : Share(order, budget)) {
        work.Add(At(prefills[static_cast<size_t>(chunk.prompt)]).computed, chunk.num_tokens);
      }
      return pace_->cost.Milliseconds(work) <= pace_->target_ms;
    };
    int low = std::min(kLeastChunk, budget_);
    int high = std::max(low, std::min(budget_, pace_->cost.TrustedChunk()));
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (fits(middle)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return WholeTiles(prefills, low);
  }

  int WholeTiles(const std::vector<int>& prefills, int budget) const {
    int64_t wanted = 0;
    for (int i : prefills) wanted += Remaining(i);
    if (wanted <= budget) return budget;
    const int rows = limits_.max_num_batched_tokens - budget_ + budget;
    const int surplus = rows % pace_->row_tile;
    return rows > pace_->row_tile && budget - surplus >= kLeastChunk ? budget - surplus : budget;
  }

  void AddResumed() {
    int holders = 0;
    for (const SequenceView& sequence : view_.sequences) {
      if (sequence.phase == SequencePhase::kRunnable) ++holders;
    }
    for (int i = 0; i < Count(); ++i) {
      if (At(i).phase != SequencePhase::kPreempted) continue;
      const int needed = BlocksFor(At(i).length + 1, limits_.block_size);
      if (needed + holders > free_) return;
      free_ -= needed;
      ++holders;
      plan_.resume.push_back(i);
    }
  }

  const View& view_;
  const Limits& limits_;
  const Pace* const pace_;
  Plan plan_;
  int free_;
  int returning_;
  int budget_;
  int youngest_;
};

}  // namespace

Plan NextBatch(const View& view, const Limits& limits, const Pace* pace) {
  return Planner(view, limits, pace).Make();
}

int AdmissibleBlocks(const View& view, int total_blocks, const Limits& limits) {
  if (static_cast<int>(view.sequences.size()) >= limits.max_num_seqs) return 0;
  for (const SequenceView& sequence : view.sequences) {
    if (sequence.phase == SequencePhase::kPreempted) return 0;
  }
  const Plan plan = NextBatch(view, limits);
  if (!plan.stalled.empty() || !plan.preempt.empty()) return 0;
  int kept = view.sequences.empty() ? 0 : total_blocks / 100;
  for (const ScheduledRun& run : plan.runs) kept += run.new_blocks;
  return std::max(0, view.free_blocks - kept);
}

}  // namespace tandem::decode
