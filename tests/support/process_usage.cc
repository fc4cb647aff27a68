#include "tests/support/process_usage.h"

#include <filesystem>
#include <fstream>
#include <vector>

namespace tandem {
namespace {

std::filesystem::path ProcPath(pid_t pid, const std::string& name) {
  return "/proc/" + std::to_string(pid) + "/" + name;
}

// Errors (the process may end meanwhile) are an empty list.
std::vector<std::filesystem::path> Entries(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> entries;
  std::error_code error;
  std::filesystem::directory_iterator it(directory, error);
  while (!error && it != std::filesystem::directory_iterator()) {
    entries.push_back(it->path());
    it.increment(error);
  }
  return entries;
}

}  // namespace

std::optional<ProcessUsage> UsageOf(pid_t pid) {
  ProcessUsage usage;
  std::ifstream status(ProcPath(pid, "status"));
  std::string key;
  while (status >> key) {
    if (key == "RssAnon:") status >> usage.resident_kib;
    if (key == "Threads:") status >> usage.threads;
  }
  if (usage.threads == 0) return std::nullopt;
  usage.descriptors = static_cast<int>(Entries(ProcPath(pid, "fd")).size());
  return usage;
}

std::optional<pid_t> ThreadNamed(pid_t pid, const std::string& name) {
  std::optional<pid_t> first;
  for (const std::filesystem::path& task : Entries(ProcPath(pid, "task"))) {
    std::string found;
    std::ifstream comm(task / "comm");
    std::getline(comm, found);
    const pid_t thread = std::stoi(task.filename());
    if (found == name && (!first.has_value() || thread < *first)) first = thread;
  }
  return first;
}

}  // namespace tandem
