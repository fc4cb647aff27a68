// How often the kernel has killed a process for want of memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace tandem::cli {

// Of this process's cgroup (memory.events of version 2, memory.oom_control of 1), else of the
// machine (/proc/vmstat); nothing where none of them tells. Only the difference of two answers
// means something. `root` stands before the paths, for tests.
std::optional<uint64_t> CountOomKills(const std::string& root = "");

}  // namespace tandem::cli
