#include "common/base/timer_queue.h"

namespace tandem {

TimerQueue::Id TimerQueue::Set(absl::Time when, std::function<void()> fire) {
  Id id;
  bool first;
  {
    absl::MutexLock lock(&mutex_);
    id = ++last_id_;
    times_[id] = when;
    const auto timer = timers_.emplace(Key{when, id}, std::move(fire)).first;
    first = timer == timers_.begin();
  }
  if (first && on_earlier_) on_earlier_();
  return id;
}

void TimerQueue::Cancel(Id id) {
  std::function<void()> cancelled;  // destroyed after the lock is given back: it may own anything
  absl::MutexLock lock(&mutex_);
  const auto found = times_.find(id);
  if (found == times_.end()) return;
  const auto timer = timers_.find(Key{found->second, id});
  cancelled = std::move(timer->second);
  timers_.erase(timer);
  times_.erase(found);
}

absl::Time TimerQueue::Next() const {
  absl::MutexLock lock(&mutex_);
  return timers_.empty() ? absl::InfiniteFuture() : timers_.begin()->first.first;
}

size_t TimerQueue::FireDue() {
  const absl::Time now = clock_->Now();
  for (size_t fired = 0;; ++fired) {
    std::function<void()> fire;
    {
      absl::MutexLock lock(&mutex_);
      if (timers_.empty() || timers_.begin()->first.first > now) return fired;
      times_.erase(timers_.begin()->first.second);
      fire = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
    }
    fire();
  }
}

}  // namespace tandem
