#include "router/dispatch/suspect_prompts.h"

#include <iterator>

namespace tandem::router {

SuspectPrompts::SuspectPrompts(Clock* clock, size_t capacity, absl::Duration memory)
    : clock_(clock), capacity_(capacity), memory_(memory) {}

void SuspectPrompts::Forget(absl::Time now) {
  while (!entries_.empty() &&
         (entries_.size() > capacity_ || now >= entries_.front().last + memory_)) {
    by_prompt_.erase(entries_.front().prompt);
    entries_.pop_front();
  }
}

void SuspectPrompts::NoteLoss(const Hash128& prompt, const Loss& loss) {
  absl::MutexLock lock(&mutex_);
  const absl::Time now = clock_->Now();
  Forget(now);
  auto [it, added] = by_prompt_.try_emplace(prompt);
  if (added) {
    it->second = entries_.insert(entries_.end(), {prompt, {}, now});
  } else {
    entries_.splice(entries_.end(), entries_, it->second);
  }
  Entry& entry = *it->second;
  entry.last = now;
  std::erase_if(entry.losses, [&](const Loss& known) { return known.SameProcess(loss); });
  entry.losses.push_back(loss);
  // Of those, the oldest may long be known to live.
  if (std::ssize(entry.losses) > kMaxDeaths) entry.losses.erase(entry.losses.begin());
  Forget(now);
}

void SuspectPrompts::NoteServed(const Hash128& prompt) {
  absl::MutexLock lock(&mutex_);
  const auto it = by_prompt_.find(prompt);
  if (it == by_prompt_.end()) return;
  entries_.erase(it->second);
  by_prompt_.erase(it);
}

bool SuspectPrompts::IsPoison(const Hash128& prompt, const ClusterView& view) {
  absl::MutexLock lock(&mutex_);
  Forget(clock_->Now());
  const auto it = by_prompt_.find(prompt);
  if (it == by_prompt_.end()) return false;
  std::vector<Loss>& losses = it->second->losses;
  std::erase_if(losses, [&](const Loss& loss) { return FateOf(loss, view) == Fate::kLives; });
  return std::ssize(losses) >= kMaxDeaths;
}

bool SuspectPrompts::empty() const {
  absl::MutexLock lock(&mutex_);
  return entries_.empty();
}

}  // namespace tandem::router
