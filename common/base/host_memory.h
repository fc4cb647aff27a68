// The host's memory: how much there is of it, and how much of that this process may still take.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace tandem {

struct HostMemory {
  size_t total = 0;      // bytes: of the machine, or the least limit of a control group
  size_t available = 0;  // bytes that may still be taken before any of them is reached
  // Where the bytes available were found to be least: "this machine" or a control group's file.
  std::string limited_by;
};

// Asks the machine and every control group that this process is in, its own and those above it, of
// version 1 and 2. `root` begins the paths of all files, for tests.
HostMemory ReadHostMemory(const std::string& root = "");

// Bytes that a process holds and would give back at its end: its own memory, and its part of what
// it shares with others; not files that are mapped. None where that cannot be read.
std::optional<size_t> ReadProcessMemory(int pid, const std::string& root = "");

// Whether the kernel gives shared memory huge pages to who asks for them (madvise).
bool SharedMemoryHasHugePages(const std::string& root = "");

}  // namespace tandem
