#include <vector>

#include "common/base/status.h"
#include "engine/device/cuda/cuda_device.h"
#include "engine/kernels/cuda/cuda_ops.h"
#include "engine/kernels/cuda/cuda_ranks.h"
#include "engine/runtime/backend.h"

namespace tandem::engine {
namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(std::unique_ptr<cuda::CudaDevice> device) : device_(std::move(device)) {}

  std::string name() const override { return "cuda"; }
  Device& device() override { return *device_; }
  absl::StatusOr<std::unique_ptr<Ops>> MakeOps(const OpsShape& shape) override {
    if (shape.element != Element::kBFloat16) {
      return InvalidArgument(
          "--device=cuda computes in bfloat16 only: give --dtype=bfloat16, or --device=cpu");
    }
    if (shape.fp8) {
      return InvalidArgument(
          "--quantization=fp8 is for CPUs: GPUs do not read weights of 8 bits yet; leave it "
          "out, or give --device=cpu");
    }
    return cuda::MakeCudaOps(shape, device_.get());
  }
  absl::StatusOr<std::unique_ptr<Ranks>> MakeRanks(std::span<Backend* const> all) override {
    std::vector<cuda::CudaDevice*> devices;
    for (Backend* backend : all) {
      devices.push_back(static_cast<CudaBackend*>(backend)->device_.get());
    }
    return cuda::MakeCudaRanks(devices);
  }
  int max_in_flight() const override { return 2; }
  BatchDefaults batch_defaults() const override { return {8192, 256}; }

 private:
  const std::unique_ptr<cuda::CudaDevice> device_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> OpenCudaBackend(const BackendOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(auto device, cuda::CudaDevice::Open(options.gpu));
  return std::make_unique<CudaBackend>(std::move(device));
}

}  // namespace tandem::engine
