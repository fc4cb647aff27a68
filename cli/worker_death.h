// Why a worker ended, where its wait status alone says too little. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace tandem::cli {

// What is known of the memory when it ended.
struct MemoryAtDeath {
  std::optional<bool> oom_killed;  // the kernel has killed for want of memory meanwhile
  int workers = 0;
  uint64_t worker_bytes = 0;  // of weights, each; 0: not known
};

// "" where the status says enough: only SIGKILL says nothing of its sender.
std::string ExplainDeath(int wait_status, const MemoryAtDeath& memory);

}  // namespace tandem::cli
