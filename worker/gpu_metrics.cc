#include "worker/gpu_metrics.h"

#include <array>
#include <dlfcn.h>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace tandem::worker {
namespace {

// Of a page for its part of the card; the driver takes some milliseconds.
constexpr absl::Duration kPatience = absl::Seconds(2);

// A library of the driver. No program links one, so that all start on a machine without; nor does
// every build have their headers, of which little is needed.
class DriverLibrary {
 public:
  explicit DriverLibrary(const char* name) : library_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {}

  // Null: there is none.
  template <typename Function>
  Function* Find(const char* name) const {
    return library_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library_, name));
  }

 private:
  void* const library_;  // until the process ends: a driver does not like to be unloaded
};

// "" where it cannot be told.
std::string PciAddress(int ordinal) {
  const DriverLibrary cuda("libcuda.so.1");
  const auto init = cuda.Find<int(unsigned)>("cuInit");
  const auto get = cuda.Find<int(int*, int)>("cuDeviceGet");
  const auto address = cuda.Find<int(char*, int, int)>("cuDeviceGetPCIBusId");
  int device = 0;
  std::array<char, 32> text = {};
  if (init == nullptr || get == nullptr || address == nullptr || init(0) != 0 ||
      get(&device, ordinal) != 0 ||
      address(text.data(), static_cast<int>(text.size()), device) != 0) {
    return "";
  }
  return text.data();
}

// nvml.h
struct NvmlMemory {
  unsigned long long total, free, used;
};
struct NvmlUtilization {
  unsigned gpu, memory;  // %
};
using NvmlDevice = struct NvmlDeviceTag*;

class Nvml {
 public:
  // Null: it is not there, or does not know the card.
  static std::shared_ptr<Nvml> Open(const std::string& bus) {
    auto nvml = std::shared_ptr<Nvml>(new Nvml());
    const auto init = nvml->library_.Find<int()>("nvmlInit_v2");
    const auto find =
        nvml->library_.Find<int(const char*, NvmlDevice*)>("nvmlDeviceGetHandleByPciBusId_v2");
    const bool found =
        init != nullptr && find != nullptr && init() == 0 && find(bus.c_str(), &nvml->device_) == 0;
    return found ? nvml : nullptr;
  }

  GpuReading Read() const {
    GpuReading out;
    NvmlMemory memory = {};
    NvmlUtilization utilization = {};
    unsigned milliwatts = 0;
    if (memory_ != nullptr && memory_(device_, &memory) == 0) {
      out.memory_bytes = static_cast<double>(memory.total);
      out.memory_used_bytes = static_cast<double>(memory.used);
    }
    if (utilization_ != nullptr && utilization_(device_, &utilization) == 0) {
      out.utilization = utilization.gpu / 100.0;
    }
    if (power_ != nullptr && power_(device_, &milliwatts) == 0) {
      out.power_watts = milliwatts / 1e3;
    }
    return out;
  }

 private:
  Nvml() = default;

  const DriverLibrary library_{"libnvidia-ml.so.1"};
  NvmlDevice device_ = nullptr;
  int (*const memory_)(NvmlDevice, NvmlMemory*) =
      library_.Find<int(NvmlDevice, NvmlMemory*)>("nvmlDeviceGetMemoryInfo");
  int (*const utilization_)(NvmlDevice, NvmlUtilization*) =
      library_.Find<int(NvmlDevice, NvmlUtilization*)>("nvmlDeviceGetUtilizationRates");
  int (*const power_)(NvmlDevice, unsigned*) =
      library_.Find<int(NvmlDevice, unsigned*)>("nvmlDeviceGetPowerUsage");
};

// Reads on a thread of its own: a card that is lost can hang whoever asks the driver for it, and
// the page has other things to say. Such a thread is left behind, with all that it needs.
class PatientReader {
 public:
  explicit PatientReader(std::function<GpuReading()> read)
      : state_(new State{.read = std::move(read)}) {}

  // Nothing known where it takes long, and while what was asked before has not come.
  GpuReading Read() const {
    State& state = *state_;
    absl::MutexLock lock(&state.mutex);
    if (std::exchange(state.reading, true)) return {};
    std::thread([kept = state_] {
      const GpuReading reading = kept->read();
      absl::MutexLock kept_lock(&kept->mutex);
      kept->last = reading;
      kept->reading = false;
    }).detach();
    const auto came = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(state.mutex) { return !state.reading; };
    const bool in_time = state.mutex.AwaitWithTimeout(absl::Condition(&came), kPatience);
    return in_time ? state.last : GpuReading();
  }

 private:
  struct State {
    const std::function<GpuReading()> read;
    absl::Mutex mutex;
    bool reading ABSL_GUARDED_BY(mutex) = false;
    GpuReading last ABSL_GUARDED_BY(mutex);
  };
  const std::shared_ptr<State> state_;
};

class GpuMetrics final : public prometheus::Collectable {
 public:
  GpuMetrics(const MetricLabels& labels, GpuGauge gauge) : reader_(std::move(gauge.read)) {
    for (const auto& [name, value] : labels) labels_.push_back({name, value});
    labels_.push_back({"gpu", gauge.bus});
  }

  std::vector<prometheus::MetricFamily> Collect() const override {
    const GpuReading reading = reader_.Read();
    std::vector<prometheus::MetricFamily> out;
    const auto add = [&](const char* name, const char* help, std::optional<double> value) {
      if (!value.has_value()) return;
      prometheus::ClientMetric metric;
      metric.label = labels_;
      metric.gauge.value = *value;
      out.push_back({name, help, prometheus::MetricType::Gauge, {std::move(metric)}});
    };
    add("tandem_gpu_memory_bytes", "Memory of the worker's GPU; with a GPU only",
        reading.memory_bytes);
    add("tandem_gpu_memory_used_bytes",
        "Memory of the worker's GPU that any process has; with a GPU only",
        reading.memory_used_bytes);
    add("tandem_gpu_utilization_ratio",
        "Share of the last moments in which the worker's GPU computed, 0 to 1; with a GPU only",
        reading.utilization);
    add("tandem_gpu_power_watts", "What the worker's GPU draws; with a GPU only",
        reading.power_watts);
    return out;
  }

 private:
  const PatientReader reader_;
  std::vector<prometheus::ClientMetric::Label> labels_;
};

}  // namespace

std::optional<GpuGauge> OpenGpuGauge(int ordinal) {
  const std::string bus = PciAddress(ordinal);
  if (bus.empty()) return std::nullopt;
  const std::shared_ptr<Nvml> nvml = Nvml::Open(bus);
  if (nvml == nullptr) return std::nullopt;
  return GpuGauge{bus, [nvml] { return nvml->Read(); }};
}

void AddGpuMetrics(Metrics* metrics, const MetricLabels& labels, GpuGauge gauge) {
  metrics->Add(std::make_unique<GpuMetrics>(labels, std::move(gauge)));
}

}  // namespace tandem::worker
