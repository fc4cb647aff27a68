#include "router/dispatch/suspect_prompts.h"

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

void SuspectPrompts::NoteDeath(const Hash128& prompt, int deaths) {
  absl::MutexLock lock(&mutex_);
  const absl::Time now = clock_->Now();
  Forget(now);
  auto [it, added] = by_prompt_.try_emplace(prompt);
  if (added) {
    it->second = entries_.insert(entries_.end(), {prompt, 0, now});
  } else {
    entries_.splice(entries_.end(), entries_, it->second);
  }
  it->second->deaths += deaths;
  it->second->last = now;
  Forget(now);
}

void SuspectPrompts::NoteServed(const Hash128& prompt) {
  absl::MutexLock lock(&mutex_);
  const auto it = by_prompt_.find(prompt);
  if (it == by_prompt_.end()) return;
  entries_.erase(it->second);
  by_prompt_.erase(it);
}

bool SuspectPrompts::IsPoison(const Hash128& prompt) {
  absl::MutexLock lock(&mutex_);
  Forget(clock_->Now());
  const auto it = by_prompt_.find(prompt);
  return it != by_prompt_.end() && it->second->deaths >= kMaxDeaths;
}

bool SuspectPrompts::empty() const {
  absl::MutexLock lock(&mutex_);
  return entries_.empty();
}

}  // namespace tandem::router
