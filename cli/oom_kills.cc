#include "cli/oom_kills.h"

#include <fstream>
#include <sstream>
#include <vector>

namespace tandem::cli {
namespace {

// The number behind `key` at the beginning of a line of the file.
std::optional<uint64_t> ReadCounter(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    std::string name;
    uint64_t count = 0;
    if (words >> name >> count && name == key) return count;
  }
  return std::nullopt;
}

}  // namespace

std::optional<uint64_t> CountOomKills(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  std::string line;
  std::vector<std::string> files;
  while (std::getline(groups, line)) {  // "0::/user.slice", "4:memory:/docker/1234"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    // In a container the group's own directory may be all that is mounted.
    for (const std::string& place : {group, std::string()}) {
      if (controllers.empty()) files.push_back("/sys/fs/cgroup" + place + "/memory.events");
      if (controllers == "memory") {
        files.push_back("/sys/fs/cgroup/memory" + place + "/memory.oom_control");
      }
    }
  }
  files.push_back("/proc/vmstat");
  for (const std::string& file : files) {
    if (const auto count = ReadCounter(root + file, "oom_kill")) return count;
  }
  return std::nullopt;
}

}  // namespace tandem::cli
