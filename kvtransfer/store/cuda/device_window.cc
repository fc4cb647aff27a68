// Pages are gathered, and digested, into a buffer on the card by one kernel, at the rate of its own
// memory; a copy engine moves the buffer over the link. The other way likewise. So the processors
// are busy for microseconds, not for as long as the link takes, and the engine sees copies of
// megabytes. Small copies go without the buffer: there the kernel works on the host's memory
// itself.
#include "kvtransfer/store/cuda/device_window.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <cuda_runtime.h>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/check.h"
#include "common/base/clock.h"
#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/store/cuda/page_kernels.h"
#include "kvtransfer/store/cuda/registered_pages.h"
#include "kvtransfer/store/staging_plan.h"

namespace tandem::kvtransfer::cuda {
namespace {

constexpr size_t kMaxPieces = 4096;  // of a launch
// Up to here a kernel on the host's memory is done before a launch and an engine's copy are.
constexpr size_t kDirectBytes = size_t{1} << 20;

// What one copy needs while it is under way.
struct Lane {
  cudaStream_t stream = nullptr;
  cudaEvent_t end = nullptr;
  std::byte* buffer = nullptr;  // on the card
  // Pinned, in one allocation.
  std::byte* tables = nullptr;
  PlacedBlock* blocks = nullptr;
  uint64_t* digests = nullptr;
  StagedPiece* pieces = nullptr;  // kMaxPieces
};

class DeviceWindow final : public HostWindow {
 public:
  static absl::StatusOr<std::unique_ptr<HostWindow>> Open(const KvRegion& region, int device,
                                                          RegisteredPages window,
                                                          size_t max_copy_bytes);
  ~DeviceWindow() override;

  std::unique_ptr<Gathering> Gather(const BlockRun& run, size_t at) override;
  std::unique_ptr<Fetched> Fetch(size_t at, size_t bytes) override;
  void ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) override;
  std::vector<std::byte> ProbeIn(size_t at, size_t bytes, bool wanted) override;

 private:
  class LaneLease;
  class DeviceGathering;
  class DeviceFetched;

  DeviceWindow(const KvRegion& region, int device, RegisteredPages window)
      : region_(region), shape_(ShapeOf(region)), device_(device), window_(std::move(window)) {}

  std::byte* OnHost(size_t at) const { return window_.pages().data() + at; }

  const KvRegion region_;
  const KvPoolShape shape_;
  const int device_;
  const RegisteredPages window_;
  std::array<Lane, kDepth> lanes_;  // what they name is a copy's while it has them
  absl::Mutex mutex_;
  std::vector<const Lane*> free_ ABSL_GUARDED_BY(mutex_);
};

// A lane while a copy has it.
class DeviceWindow::LaneLease {
 public:
  explicit LaneLease(DeviceWindow* window) : window_(window) {
    TANDEM_CUDA_CHECK(cudaSetDevice(window_->device_));
    absl::MutexLock lock(&window_->mutex_);
    TANDEM_CHECK(!window_->free_.empty(), "more than {} copies of a window", kDepth);
    lane_ = window_->free_.back();
    window_->free_.pop_back();
  }
  ~LaneLease() {
    cudaStreamSynchronize(lane_->stream);
    absl::MutexLock lock(&window_->mutex_);
    window_->free_.push_back(lane_);
  }
  LaneLease(const LaneLease&) = delete;
  const Lane* operator->() const { return lane_; }

 private:
  DeviceWindow* const window_;
  const Lane* lane_ = nullptr;
};

class DeviceWindow::DeviceGathering final : public Gathering {
 public:
  DeviceGathering(DeviceWindow* window, const BlockRun& run, size_t at)
      : device_(window->device_), lane_(window), digests_(run.source_blocks.size(), 0) {
    const KvPoolShape& shape = window->shape_;
    size_t count = 0;
    for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
      for (const int32_t block : run.source_blocks) {
        lane_->blocks[count++] = {shape.BlockOffset(layer, block), layer, 0};
      }
    }
    pages_per_block_ = 2 * static_cast<size_t>(run.heads.count);
    pages_ = count * pages_per_block_;
    const size_t bytes = run.Bytes(shape.layout);
    const bool direct = bytes <= kDirectBytes;
    PageRunArgs args;
    args.pool = window->region_.base;
    args.blocks = lane_->blocks;
    args.num_blocks = static_cast<int>(count);
    args.pool_heads = shape.layout.num_kv_heads;
    args.pool_first_head = shape.first_head;
    args.head_begin = run.heads.begin;
    args.head_count = run.heads.count;
    args.page_bytes = static_cast<uint32_t>(shape.layout.PageBytes());
    args.to = direct ? window->window_.OnCard(window->OnHost(at)) : lane_->buffer;
    args.digests = lane_->digests;
    TANDEM_CUDA_CHECK(DigestPages(args, lane_->stream));
    if (!direct) {
      TANDEM_CUDA_CHECK(cudaMemcpyAsync(window->OnHost(at), lane_->buffer, bytes,
                                        cudaMemcpyDeviceToHost, lane_->stream));
    }
    TANDEM_CUDA_CHECK(cudaEventRecord(lane_->end, lane_->stream));
  }

  void Wait() override {
    TANDEM_CUDA_CHECK(cudaSetDevice(device_));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(lane_->end));
    // Pages are in the order [layer][block][K|V][head].
    for (size_t page = 0; page < pages_; ++page) {
      digests_[page / pages_per_block_ % digests_.size()] ^= lane_->digests[page];
    }
    pages_ = 0;
  }
  std::span<const uint64_t> digests() const override { return digests_; }

 private:
  const int device_;
  const LaneLease lane_;
  std::vector<uint64_t> digests_;
  size_t pages_ = 0;
  size_t pages_per_block_ = 1;
};

class DeviceWindow::DeviceFetched final : public Fetched {
 public:
  DeviceFetched(DeviceWindow* window, size_t at, size_t bytes)
      : window_(window), lane_(window), direct_(bytes <= kDirectBytes) {
    from_ = direct_ ? window->window_.OnCard(window->OnHost(at)) : lane_->buffer;
    if (direct_) return;
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(lane_->buffer, window->OnHost(at), bytes,
                                      cudaMemcpyHostToDevice, lane_->stream));
    TANDEM_CUDA_CHECK(cudaEventRecord(lane_->end, lane_->stream));
  }

  void Wait() override {
    if (direct_) return;
    TANDEM_CUDA_CHECK(cudaSetDevice(window_->device_));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(lane_->end));
  }
  void Scatter(std::span<const CopyPiece> pieces) override {
    TANDEM_CUDA_CHECK(cudaSetDevice(window_->device_));
    StagingPlan plan(pieces, CopyDirection::kIntoPool,
                     {kPieceBytes, kMaxPieces, std::numeric_limits<size_t>::max()});
    PieceCopyArgs args;
    args.pool = window_->region_.base;
    args.host = from_;
    args.pieces = lane_->pieces;
    args.direction = CopyDirection::kIntoPool;
    while (true) {
      const std::vector<StagedPiece>& batch = plan.Next();
      if (batch.empty()) return;
      std::memcpy(lane_->pieces, batch.data(), batch.size() * sizeof(StagedPiece));
      args.num_pieces = static_cast<int>(batch.size());
      TANDEM_CUDA_CHECK(CopyPieces(args, lane_->stream));
      TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane_->stream));
    }
  }

 private:
  DeviceWindow* const window_;
  const LaneLease lane_;
  const bool direct_;
  std::byte* from_ = nullptr;
};

absl::StatusOr<std::unique_ptr<HostWindow>> DeviceWindow::Open(const KvRegion& region, int device,
                                                               RegisteredPages window,
                                                               size_t max_copy_bytes) {
  std::unique_ptr<DeviceWindow> opened(new DeviceWindow(region, device, std::move(window)));
  int least = 0;
  int greatest = 0;
  TANDEM_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const size_t pages = max_copy_bytes / region.layout.PageBytes() + 1;
  const size_t block_bytes = (pages / 2 + 1) * sizeof(PlacedBlock);
  const size_t digest_bytes = pages * sizeof(uint64_t);
  const size_t piece_bytes = kMaxPieces * sizeof(StagedPiece);
  for (Lane& lane : opened->lanes_) {
    void* buffer = nullptr;
    void* tables = nullptr;
    const bool allocated = cudaMalloc(&buffer, max_copy_bytes) == cudaSuccess &&
                           cudaHostAlloc(&tables, piece_bytes + block_bytes + digest_bytes,
                                         cudaHostAllocPortable) == cudaSuccess;
    lane.buffer = static_cast<std::byte*>(buffer);
    lane.tables = static_cast<std::byte*>(tables);
    if (!allocated) {
      cudaGetLastError();
      return ResourceExhausted("a KV link needs {} bytes of the card's memory and {} pinned ones",
                               kDepth * max_copy_bytes,
                               kDepth * (piece_bytes + block_bytes + digest_bytes));
    }
    lane.pieces = reinterpret_cast<StagedPiece*>(lane.tables);
    lane.blocks = reinterpret_cast<PlacedBlock*>(lane.tables + piece_bytes);
    lane.digests = reinterpret_cast<uint64_t*>(lane.tables + piece_bytes + block_bytes);
    // Before the work of a long prefill that waits for a processor.
    TANDEM_CUDA_CHECK(cudaStreamCreateWithPriority(&lane.stream, cudaStreamNonBlocking, greatest));
    TANDEM_CUDA_CHECK(cudaEventCreateWithFlags(&lane.end, cudaEventDisableTiming));
    // A probe sends it before anything else has written it.
    TANDEM_CUDA_CHECK(cudaMemsetAsync(lane.buffer, 0, max_copy_bytes, lane.stream));
    absl::MutexLock lock(&opened->mutex_);
    opened->free_.push_back(&lane);
  }
  return opened;
}

DeviceWindow::~DeviceWindow() {
  cudaSetDevice(device_);
  for (const Lane& lane : lanes_) {
    if (lane.end != nullptr) cudaEventDestroy(lane.end);
    if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
    if (lane.tables != nullptr) cudaFreeHost(lane.tables);
    if (lane.buffer != nullptr) cudaFree(lane.buffer);
  }
}

std::unique_ptr<HostWindow::Gathering> DeviceWindow::Gather(const BlockRun& run, size_t at) {
  return std::make_unique<DeviceGathering>(this, run, at);
}

std::unique_ptr<HostWindow::Fetched> DeviceWindow::Fetch(size_t at, size_t bytes) {
  return std::make_unique<DeviceFetched>(this, at, bytes);
}

void DeviceWindow::ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) {
  const LaneLease lane(this);
  if (!pattern.empty()) {
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(lane->buffer, pattern.data(), pattern.size(),
                                      cudaMemcpyHostToDevice, lane->stream));
  }
  TANDEM_CUDA_CHECK(
      cudaMemcpyAsync(OnHost(at), lane->buffer, bytes, cudaMemcpyDeviceToHost, lane->stream));
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane->stream));
}

std::vector<std::byte> DeviceWindow::ProbeIn(size_t at, size_t bytes, bool wanted) {
  const LaneLease lane(this);
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
  return DeviceWindow::Open(region, device, std::move(pages), max_copy_bytes);
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
