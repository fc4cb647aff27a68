// One seed: a cluster, a workload, the faults that it meets, and what must hold all the same.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace tandem {

// What can happen to a cluster. Those from kLost on, to a message.
enum class Fault {
  kKill,
  kHang,
  kStop,
  kBrokenStay,
  kBrokenLinks,
  kClockJump,
  kPartition,
  kIdleBitFlip,
  kFailedStep,
  kBrokenNumbers,
  kClientGone,
  kSlowReader,
  kLost,
  kTwice,
  kOvertaken,
  kLate,
  kCut,
  kBitFlip,
  kMisplaced,
};
inline constexpr size_t kNumFaults = static_cast<size_t>(Fault::kMisplaced) + 1;
std::string_view FaultName(size_t fault);
using FaultCounts = std::array<uint32_t, kNumFaults>;

struct SeedResult {
  std::string errors;  // one a line, each names the seed; "" where all is well
  std::string story;   // what the seed was about, for a replay
  int requests = 0;
  int served = 0;  // with OK
  int migrations = 0;
  int returned_tokens = 0;  // came back from decode workers to prefill workers
  FaultCounts met = {};     // how often it really happened
  uint64_t events = 0;
  uint64_t fingerprint = 0;  // of everything that clients saw: the same in every run
};

SeedResult RunSeed(uint64_t seed);

}  // namespace tandem
