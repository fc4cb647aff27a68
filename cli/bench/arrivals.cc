#include "cli/bench/arrivals.h"

#include <random>

namespace tandem::cli {

std::vector<double> MakeArrivals(const ArrivalOptions& options, size_t count) {
  std::mt19937_64 random(options.seed);
  const double mean = 1 / options.requests_per_second;
  std::gamma_distribution<double> gap(options.burstiness, mean / options.burstiness);
  std::vector<double> out;
  out.reserve(count);
  double at = 0;
  for (size_t i = 0; i < count; ++i) {
    // A product, because a sum of equal gaps drifts.
    out.push_back(options.constant ? static_cast<double>(i) * mean : at);
    at += gap(random);
  }
  return out;
}

}  // namespace tandem::cli
