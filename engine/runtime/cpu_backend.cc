#include "common/base/status.h"
#include "engine/device/cpu/cpu_device.h"
#include "engine/device/cpu/host_ranks.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/runtime/backend.h"

namespace tandem::engine {
namespace {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options) : device_({options.num_threads}) {}

  std::string name() const override { return "cpu"; }
  Device& device() override { return device_; }
  absl::StatusOr<std::unique_ptr<Ops>> MakeOps(const OpsShape& shape) override {
    TANDEM_ASSIGN_OR_RETURN(Buffer scratch, device_.Allocate(CpuOps::ScratchBytes(shape)));
    return std::make_unique<CpuOps>(shape, std::move(scratch), &device_.threads());
  }
  absl::StatusOr<std::unique_ptr<Ranks>> MakeRanks(std::span<Backend* const> all) override {
    return std::make_unique<HostRanks>(static_cast<int>(all.size()));
  }
  int max_in_flight() const override { return 1; }

 private:
  CpuDevice device_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> OpenCpuBackend(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace tandem::engine
