// Pages are gathered, and digested, into a buffer on the card by one kernel, at the rate of its own
// memory; a copy engine moves the buffer over the link. The other way likewise. So the processors
// are busy for microseconds, not for as long as the link takes, and the engine sees copies of
// megabytes. Small copies go without the buffer: there the kernel works on the host's memory
// itself.
#include "kvtransfer/store/cuda/device_window.h"

#include <array>
#include <cctype>
#include <cuda_runtime.h>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "kvtransfer/store/cuda/registered_pages.h"
#include "kvtransfer/store/cuda/staging_lanes.h"

namespace tandem::kvtransfer::cuda {
namespace {

// Up to here a kernel on the host's memory is done before a launch and an engine's copy are.
constexpr size_t kDirectBytes = size_t{1} << 20;

class DeviceWindow final : public HostWindow {
 public:
  DeviceWindow(const KvLayout& layout, RegisteredPages window, std::unique_ptr<StagingLanes> lanes)
      : layout_(layout), window_(std::move(window)), lanes_(std::move(lanes)) {}

  std::unique_ptr<Gathering> Gather(const BlockRun& run, size_t at) override;
  std::unique_ptr<Fetched> Fetch(size_t at, size_t bytes) override;
  void ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) override;
  std::vector<std::byte> ProbeIn(size_t at, size_t bytes, bool wanted) override;

 private:
  class DeviceGathering;
  class DeviceFetched;

  std::byte* OnHost(size_t at) const { return window_.pages().data() + at; }

  const KvLayout layout_;
  const RegisteredPages window_;
  const std::unique_ptr<StagingLanes> lanes_;
};

class DeviceWindow::DeviceGathering final : public Gathering {
 public:
  DeviceGathering(DeviceWindow* window, const BlockRun& run, size_t at)
      : device_(window->lanes_->device()), lane_(window->lanes_.get()), digests_(run) {
    const size_t bytes = run.Bytes(window->layout_);
    if (bytes <= kDirectBytes) {
      window->lanes_->Gather(lane_, run, window->window_.OnCard(window->OnHost(at)));
    } else {
      window->lanes_->Gather(lane_, run, lane_->buffer);
      TANDEM_CUDA_CHECK(cudaMemcpyAsync(window->OnHost(at), lane_->buffer, bytes,
                                        cudaMemcpyDeviceToHost, lane_->stream));
    }
    TANDEM_CUDA_CHECK(cudaEventRecord(lane_->end, lane_->stream));
  }

  absl::Status Wait() override {
    TANDEM_CUDA_CHECK(cudaSetDevice(device_));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(lane_->end));
    digests_.Take(lane_);
    return absl::OkStatus();
  }
  std::span<const uint64_t> digests() const override { return digests_.by_block(); }

 private:
  const int device_;
  const StagingLanes::Lease lane_;
  StagingLanes::Digests digests_;
};

class DeviceWindow::DeviceFetched final : public Fetched {
 public:
  DeviceFetched(DeviceWindow* window, size_t at, size_t bytes)
      : lanes_(window->lanes_.get()), lane_(lanes_), direct_(bytes <= kDirectBytes) {
    from_ = direct_ ? window->window_.OnCard(window->OnHost(at)) : lane_->buffer;
    if (direct_) return;
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(lane_->buffer, window->OnHost(at), bytes,
                                      cudaMemcpyHostToDevice, lane_->stream));
    TANDEM_CUDA_CHECK(cudaEventRecord(lane_->end, lane_->stream));
  }

  absl::Status Wait() override {
    if (direct_) return absl::OkStatus();
    TANDEM_CUDA_CHECK(cudaSetDevice(lanes_->device()));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(lane_->end));
    return absl::OkStatus();
  }
  void Scatter(std::span<const CopyPiece> pieces) override {
    lanes_->Scatter(lane_, from_, pieces);
  }

 private:
  StagingLanes* const lanes_;
  const StagingLanes::Lease lane_;
  const bool direct_;
  std::byte* from_ = nullptr;
};

std::unique_ptr<Gathering> DeviceWindow::Gather(const BlockRun& run, size_t at) {
  return std::make_unique<DeviceGathering>(this, run, at);
}

std::unique_ptr<Fetched> DeviceWindow::Fetch(size_t at, size_t bytes) {
  return std::make_unique<DeviceFetched>(this, at, bytes);
}

void DeviceWindow::ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) {
  const StagingLanes::Lease lane(lanes_.get());
  if (!pattern.empty()) {
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(lane->buffer, pattern.data(), pattern.size(),
                                      cudaMemcpyHostToDevice, lane->stream));
  }
  TANDEM_CUDA_CHECK(
      cudaMemcpyAsync(OnHost(at), lane->buffer, bytes, cudaMemcpyDeviceToHost, lane->stream));
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane->stream));
}

std::vector<std::byte> DeviceWindow::ProbeIn(size_t at, size_t bytes, bool wanted) {
  const StagingLanes::Lease lane(lanes_.get());
  TANDEM_CUDA_CHECK(
      cudaMemcpyAsync(lane->buffer, OnHost(at), bytes, cudaMemcpyHostToDevice, lane->stream));
  std::vector<std::byte> came(wanted ? bytes : 0);
  if (wanted) {
    TANDEM_CUDA_CHECK(
        cudaMemcpyAsync(came.data(), lane->buffer, bytes, cudaMemcpyDeviceToHost, lane->stream));
  }
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane->stream));
  return came;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HostWindow>> OpenDeviceWindow(const KvRegion& region, int device,
                                                             std::span<std::byte> window,
                                                             size_t max_copy_bytes) {
  TANDEM_CUDA_CHECK(cudaSetDevice(device));
  TANDEM_ASSIGN_OR_RETURN(RegisteredPages pages, RegisteredPages::Register(window));
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<StagingLanes> lanes,
                          StagingLanes::Open(region, device, max_copy_bytes));
  return std::make_unique<DeviceWindow>(region.layout, std::move(pages), std::move(lanes));
}

int NodeOfCard(int device) {
  std::array<char, 32> bus = {};  // "0000:C1:00.0"
  if (cudaDeviceGetPCIBusId(bus.data(), bus.size(), device) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  std::string name(bus.data());
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::ifstream file("/sys/bus/pci/devices/" + name + "/numa_node");
  int node = -1;
  return file >> node ? node : -1;
}

}  // namespace tandem::kvtransfer::cuda
