#include "cli/worker_death.h"

#include <csignal>
#include <sys/wait.h>

#include "fmt/format.h"

#include "common/config/bytes.h"

namespace tandem::cli {

std::string ExplainDeath(int wait_status, const MemoryAtDeath& memory) {
  if (!WIFSIGNALED(wait_status) || WTERMSIG(wait_status) != SIGKILL) return "";
  if (memory.oom_killed == false)
    return "killed from outside, not by the kernel for want of memory";
  std::string load;
  if (memory.worker_bytes > 0) {
    load =
        fmt::format(": {} worker{} x {} of weights", memory.workers, memory.workers == 1 ? "" : "s",
                    FormatBytes(static_cast<int64_t>(memory.worker_bytes)));
  }
  if (memory.oom_killed == true) {
    return fmt::format(
        "out of memory, the kernel killed it{}; fewer workers, or a smaller "
        "--kv-cache-memory-bytes, need less",
        load);
  }
  return fmt::format("probably out of memory{} (dmesg says whether the kernel killed it)", load);
}

}  // namespace tandem::cli
