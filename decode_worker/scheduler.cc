#include "decode_worker/scheduler.h"

#include <algorithm>

namespace tandem::decode {
namespace {

// The plan under construction.
class Planner {
 public:
  Planner(const View& view, const Limits& limits)
      : view_(view),
        limits_(limits),
        free_(view.free_blocks),
        returning_(view.returning_blocks),
        budget_(limits.max_num_batched_tokens),
        youngest_(Count()) {}

  Plan Make() {
    for (int i = 0; i < Count(); ++i) {
      if (CanRun(i) && Remaining(i) == 1) AddDecodeStep(i);
    }
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
    plan_.runs.push_back({i, 1, needed});
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
    const int share = std::max(1, budget_ / static_cast<int>(prefills.size()));
    std::vector<int> tokens(prefills.size(), 0);
    for (int part : {share, budget_}) {
      for (size_t k = 0; k < prefills.size(); ++k) {
        // A chunk never needs more blocks than the sequence got when it was admitted or resumed.
        const int more = std::min({part, budget_, Remaining(prefills[k]) - tokens[k]});
        tokens[k] += more;
        budget_ -= more;
      }
    }
    for (size_t k = 0; k < prefills.size(); ++k) {
      if (tokens[k] > 0) plan_.runs.push_back({prefills[k], tokens[k], 0});
    }
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
  Plan plan_;
  int free_;
  int returning_;
  int budget_;
  int youngest_;
};

}  // namespace

Plan NextBatch(const View& view, const Limits& limits) { return Planner(view, limits).Make(); }

Room CanAdmit(const View& view, int needed_blocks, int total_blocks, const Limits& limits) {
  if (static_cast<int>(view.sequences.size()) >= limits.max_num_seqs) {
    return Room::kTooManySequences;
  }
  for (const SequenceView& sequence : view.sequences) {
    if (sequence.phase == SequencePhase::kPreempted) return Room::kNoBlocks;
  }
  const Plan plan = NextBatch(view, limits);
  if (!plan.stalled.empty() || !plan.preempt.empty()) return Room::kNoBlocks;
  int kept = view.sequences.empty() ? 0 : total_blocks / 100;
  for (const ScheduledRun& run : plan.runs) kept += run.new_blocks;
  return needed_blocks + kept <= view.free_blocks ? Room::kYes : Room::kNoBlocks;
}

}  // namespace tandem::decode
