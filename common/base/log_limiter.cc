#include "common/base/log_limiter.h"

#include <algorithm>

#include "fmt/format.h"

namespace tandem {

bool LogLimiter::AllowAt(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(now - last_));
  allowance_ = std::min(kBurst, allowance_ + seconds);
  last_ = now;
  if (allowance_ < 1) {
    ++withheld_;
    return false;
  }
  allowance_ -= 1;
  return true;
}

std::string LogLimiter::Withheld() {
  absl::MutexLock lock(&mutex_);
  if (withheld_ == 0) return "";
  const std::string note = fmt::format(" (and {} lines like it)", withheld_);
  withheld_ = 0;
  return note;
}

}  // namespace tandem
