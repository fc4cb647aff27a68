#include "cli/gpu_placement.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <system_error>

namespace tandem::cli {

int CountGpus(const std::string& device_folder, const char* visible_devices) {
  if (visible_devices != nullptr) {
    const std::string names = visible_devices;
    // The list ends at the first name that is none, as CUDA reads it.
    if (names.empty() || names.front() == '-') return 0;
    return 1 + static_cast<int>(std::count(names.begin(), names.end(), ','));
  }
  int count = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(device_folder, error)) {
    const std::string name = entry.path().filename().string();
    const std::string prefix = "nvidia";
    if (name.size() > prefix.size() && name.compare(0, prefix.size(), prefix) == 0 &&
        std::all_of(name.begin() + static_cast<ptrdiff_t>(prefix.size()), name.end(),
                    [](unsigned char c) { return std::isdigit(c) != 0; })) {
      ++count;
    }
  }
  return count;
}

std::vector<GpuPlace> PlaceOnGpus(int workers, int gpus, int gpus_each) {
  std::vector<GpuPlace> places;
  if (gpus == 0) return places;
  const int groups = std::max(1, gpus / gpus_each);
  for (int i = 0; i < workers; ++i) {
    const int group = i % groups;
    const int sharing = workers / groups + (group < workers % groups ? 1 : 0);
    places.push_back({group * gpus_each, 1.0 / sharing});
  }
  return places;
}

}  // namespace tandem::cli
