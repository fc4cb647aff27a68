#include "router/keys/rate_limit.h"

namespace tandem::router {

void RateLimit::Fill(absl::Time now) {
  if (filled_ == absl::InfinitePast()) filled_ = now;
  if (now <= filled_) return;
  level_ =
      std::min(Size(), level_ + absl::FDivDuration(now - filled_, absl::Minutes(1)) * per_minute_);
  filled_ = now;
}

absl::Duration RateLimit::Wait(absl::Time now) {
  if (per_minute_ <= 0) return absl::ZeroDuration();
  Fill(now);
  // Sums of parts of a minute come out a hair below the whole number that they make.
  constexpr double kEnough = 1 - 1e-6;
  if (level_ >= kEnough) return absl::ZeroDuration();
  return absl::Minutes((1 - level_) / per_minute_);
}

void RateLimit::Take(double amount, absl::Time now) {
  if (per_minute_ <= 0) return;
  Fill(now);
  level_ -= amount;
}

void RateLimit::SetRate(double per_minute, absl::Time now) {
  Fill(now);
  level_ -= Size();
  per_minute_ = per_minute;
  level_ += Size();
}

}  // namespace tandem::router
