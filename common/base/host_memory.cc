#include "common/base/host_memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace tandem {
namespace {

// Where nothing can be read.
constexpr size_t kUnknownMemory = size_t{1} << 30;

// The names of one version's files.
struct GroupFiles {
  const char* limit;
  const char* used;
  const char* cache;  // key in memory.stat: pages of files that the kernel gives up first
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                  "total_inactive_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file"};

// A mounted hierarchy of control groups that counts memory.
struct Hierarchy {
  std::string mounted_at;
  std::string root;  // the group that is seen there: not "/" in some containers
  const GroupFiles* files;
};

// The number in a file that holds just one; none where it holds a word ("max").
std::optional<size_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

// Of lines "KEY NUMBER ...".
std::optional<size_t> ReadKey(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    size_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

size_t MachineMemory(const std::string& root, std::string_view key) {
  const std::optional<size_t> kib = ReadKey(root + "/proc/meminfo", key);
  return kib ? *kib * 1024 : kUnknownMemory;
}

bool HasOption(const std::string& list, const std::string& option) {
  const std::vector<std::string> all = absl::StrSplit(list, ',');
  return std::find(all.begin(), all.end(), option) != all.end();
}

// proc(5): "ID PARENT DEV ROOT MOUNTED_AT OPTIONS... - TYPE SOURCE SUPER_OPTIONS".
std::vector<Hierarchy> Hierarchies(const std::string& root) {
  std::vector<Hierarchy> out;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> halves = absl::StrSplit(line, absl::MaxSplits(" - ", 1));
    if (halves.size() != 2) continue;
    const std::vector<std::string> mount = absl::StrSplit(halves[0], ' ');
    const std::vector<std::string> type = absl::StrSplit(halves[1], ' ');
    if (mount.size() < 5 || type.size() < 3) continue;
    if (type[0] == "cgroup2") out.push_back({mount[4], mount[3], &kVersion2});
    if (type[0] == "cgroup" && HasOption(type[2], "memory")) {
      out.push_back({mount[4], mount[3], &kVersion1});
    }
  }
  return out;
}

// This process's group in a hierarchy, "" where it is in none. Lines "ID:CONTROLLERS:GROUP".
std::string GroupIn(const std::string& root, const Hierarchy& hierarchy) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    if (hierarchy.files == &kVersion2 ? parts[1].empty() : HasOption(parts[1], "memory")) {
      return parts[2];
    }
  }
  return "";
}

// Lessens `memory` to what the group in `folder` leaves.
void Apply(const std::string& root, const std::string& folder, const GroupFiles& files,
           HostMemory* memory) {
  const std::optional<size_t> limit = ReadNumber(root + folder + "/" + files.limit);
  const std::optional<size_t> used = ReadNumber(root + folder + "/" + files.used);
  if (!limit || !used) return;
  memory->total = std::min(memory->total, *limit);
  const size_t cache = ReadKey(root + folder + "/memory.stat", files.cache).value_or(0);
  const size_t kept = *used - std::min(*used, cache);
  const size_t left = *limit - std::min(*limit, kept);
  if (left >= memory->available) return;
  memory->available = left;
  memory->limited_by = folder + "/" + files.limit;
}

}  // namespace

HostMemory ReadHostMemory(const std::string& root) {
  HostMemory memory = {MachineMemory(root, "MemTotal:"), MachineMemory(root, "MemAvailable:"),
                       "this machine"};
  for (const Hierarchy& hierarchy : Hierarchies(root)) {
    const std::string own = GroupIn(root, hierarchy);
    absl::string_view group = own;
    // Below what is mounted; a group outside of it shows nothing but the mount itself.
    if (hierarchy.root != "/" && !absl::ConsumePrefix(&group, hierarchy.root)) group = "";
    std::string folder = hierarchy.mounted_at + std::string(absl::StripSuffix(group, "/"));
    while (true) {
      Apply(root, folder, *hierarchy.files, &memory);
      if (folder.size() <= hierarchy.mounted_at.size()) break;
      folder.resize(folder.rfind('/'));
    }
  }
  return memory;
}

std::optional<size_t> ReadProcessMemory(int pid, const std::string& root) {
  const std::string path = root + "/proc/" + std::to_string(pid) + "/smaps_rollup";
  const std::optional<size_t> own = ReadKey(path, "Pss_Anon:");
  const std::optional<size_t> shared = ReadKey(path, "Pss_Shmem:");
  if (!own || !shared) return std::nullopt;
  return (*own + *shared) * 1024;
}

bool SharedMemoryHasHugePages(const std::string& root) {
  std::ifstream file(root + "/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::string modes;
  std::getline(file, modes);  // all of them; what holds is in brackets
  return modes.find('[') != modes.npos && modes.find("[never]") == modes.npos &&
         modes.find("[deny]") == modes.npos;
}

}  // namespace tandem
