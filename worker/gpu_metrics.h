// What the driver says of the card that a worker computes on: memory, load and power, as metrics.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "common/metrics/metrics.h"

namespace tandem::worker {

// Of the whole card, whoever uses it. What a card does not tell is left out.
struct GpuReading {
  std::optional<double> memory_bytes;
  std::optional<double> memory_used_bytes;
  std::optional<double> utilization;  // 0 to 1
  std::optional<double> power_watts;
};

struct GpuGauge {
  std::string bus;  // its PCI address, "0000:41:00.0": the same for all workers on the card
  std::function<GpuReading()> read;  // from any thread, one at a time; may outlive the metrics
};

// The card that CUDA calls `ordinal` in this process, asked through NVML, the library that
// nvidia-smi asks. Nothing where there is none.
std::optional<GpuGauge> OpenGpuGauge(int ordinal);

// tandem_gpu_*, read when the page is, and left out where the driver does not answer within
// two seconds; `labels` are those of the process.
void AddGpuMetrics(Metrics* metrics, const MetricLabels& labels, GpuGauge gauge);

}  // namespace tandem::worker
