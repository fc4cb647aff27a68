// When the requests of an open loop are due: a schedule that knows nothing of the answers.
//
// Pure: the same options give the same schedule on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tandem::cli {

struct ArrivalOptions {
  double requests_per_second = 1;  // > 0
  bool constant = false;           // equal gaps instead of drawn ones
  // Shape of the gamma distribution that gaps are drawn from, > 0: 1 is a Poisson process, less
  // comes in bursts, more is steadier.
  double burstiness = 1;
  uint64_t seed = 0;
};

// Seconds from the start, ascending; the first is 0.
std::vector<double> MakeArrivals(const ArrivalOptions& options, size_t count);

}  // namespace tandem::cli
