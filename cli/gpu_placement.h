// Which worker of `tandem up` computes on which GPU of this machine.
#pragma once

#include <string>
#include <vector>

namespace tandem::cli {

// GPUs that programs started here may use: as many as `visible_devices` (CUDA_VISIBLE_DEVICES)
// names, or, where that is null, as `device_folder` (/dev) holds nodes of (nvidia0, nvidia1, ...).
// No driver is asked, so the count says nothing about whether they work.
int CountGpus(const std::string& device_folder, const char* visible_devices);

struct GpuPlace {
  int gpu = 0;              // the first of a worker's
  double memory_share = 1;  // 1 / workers on these GPUs
};

// In turns over groups of so many GPUs, in the order of the workers. Empty where there is no GPU;
// where there is not even one group, all are placed on the first GPU.
std::vector<GpuPlace> PlaceOnGpus(int workers, int gpus, int gpus_each = 1);

}  // namespace tandem::cli
