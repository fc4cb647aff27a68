#include "common/base/log_limiter.h"

#include <algorithm>
#include <utility>

#include "fmt/format.h"

namespace tandem {

bool LogLimiter::AllowAt(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(now - last_));
  allowance_ = std::min(burst_, allowance_ + seconds * per_second_);
  last_ = now;
  if (allowance_ < 1) {
    ++withheld_;
    return false;
  }
  allowance_ -= 1;
  return true;
}

uint64_t LogLimiter::TakeWithheld() {
  absl::MutexLock lock(&mutex_);
  return std::exchange(withheld_, 0);
}

std::string LogLimiter::Withheld() {
  const uint64_t withheld = TakeWithheld();
  return withheld == 0 ? "" : fmt::format(" (and {} lines like it)", withheld);
}

}  // namespace tandem
