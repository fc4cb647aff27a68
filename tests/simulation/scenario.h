// One seed: a cluster, a workload, the faults that it meets, and what must hold all the same.
#pragma once

#include <cstdint>
#include <string>

namespace tandem {

struct SeedResult {
  std::string errors;  // one a line, each names the seed; "" where all is well
  std::string story;   // what the seed was about, for a replay
  int requests = 0;
  int served = 0;  // with OK
  int migrations = 0;
  uint64_t events = 0;
  uint64_t fingerprint = 0;  // of everything that clients saw: the same in every run
};

SeedResult RunSeed(uint64_t seed);

}  // namespace tandem
