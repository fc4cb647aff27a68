// What a process takes of its machine, as /proc tells it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <sys/types.h>

namespace tandem {

struct ProcessUsage {
  int64_t resident_kib = 0;  // without pages that a file or shared memory backs
  int descriptors = 0;
  int threads = 0;
};

// Nothing if the process is gone.
std::optional<ProcessUsage> UsageOf(pid_t pid);

// The thread of a process that calls itself `name`: the first, for threads inherit the name of the
// one that starts them. Nothing if there is none.
std::optional<pid_t> ThreadNamed(pid_t pid, const std::string& name);

}  // namespace tandem
