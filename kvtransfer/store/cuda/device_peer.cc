#include "kvtransfer/store/cuda/device_peer.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"

#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "common/cuda/cuda_driver.h"
#include "kvtransfer/store/cuda/page_kernels.h"
#include "kvtransfer/store/cuda/registered_pages.h"

namespace tandem::kvtransfer::cuda {
namespace {

using ::tandem::cuda::Driver;
using ::tandem::cuda::DriverErrorText;
using ::tandem::cuda::TheDriver;

constexpr size_t kProbeBytes = size_t{4} << 20;  // at a time

absl::Status DriverError(const char* what, CUresult error) {
  return Unavailable("the peer's memory cannot be mapped: {}: {}", what, DriverErrorText(error));
}

PagePlaces PlacesOf(const KvPoolShape& shape, std::byte* base) {
  PagePlaces places;
  places.base = base;
  places.layer_bytes = shape.BlockOffset(1, 0);
  places.block_bytes = shape.layout.BlockLayerBytes();
  places.heads = shape.layout.num_kv_heads;
  places.first_head = shape.first_head;
  return places;
}

class DeviceCopy final : public PeerPool::Copy {
 public:
  // `memory`: pinned, ReportBytes().
  DeviceCopy(int device, size_t blocks, std::shared_ptr<std::byte[]> memory)
      : device_(device),
        memory_(std::move(memory)),
        digests_(reinterpret_cast<uint64_t*>(memory_.get()) + 1, blocks) {
    *revoked() = 0;
    TANDEM_CUDA_CHECK(cudaEventCreateWithFlags(&end_, cudaEventDisableTiming));
  }
  ~DeviceCopy() override { cudaEventDestroy(end_); }

  static size_t ReportBytes(size_t blocks) {
    // Few sizes, so that the memory is found again.
    return std::bit_ceil(std::max<size_t>((blocks + 1) * sizeof(uint64_t), 4096));
  }
  // What kernels write.
  uint32_t* revoked() const { return reinterpret_cast<uint32_t*>(memory_.get()); }
  std::span<const uint64_t> digests() const override { return digests_; }
  uint64_t* digests_from(size_t block) const { return digests_.data() + block; }
  cudaEvent_t end() const { return end_; }

  bool Wait() override {
    TANDEM_CUDA_CHECK(cudaSetDevice(device_));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(end_));
    return *revoked() == 0;
  }

 private:
  const int device_;
  const std::shared_ptr<std::byte[]> memory_;
  const std::span<uint64_t> digests_;  // by block of the run
  cudaEvent_t end_ = nullptr;
};

class DevicePeer final : public PeerPool {
 public:
  DevicePeer(const KvStore* store, std::byte* base, int device, const KvPoolShape& peer,
             PeerMemory memory, RegisteredPages control, PeerCopyState* state)
      : store_(store),
        pool_(PlacesOf(store->shape(), base)),
        device_(device),
        peer_(peer),
        memory_(std::move(memory)),
        control_(std::move(control)),
        state_(state) {
    int least = 0;
    int greatest = 0;
    TANDEM_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    // Before the work of a long prefill that waits for a processor.
    TANDEM_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
    TANDEM_CUDA_CHECK(cudaMemsetAsync(state_, 0, sizeof(PeerCopyState), stream_));
  }
  ~DevicePeer() override {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaFree(state_);
    cudaFree(scratch_);
  }

  std::unique_ptr<Copy> Start(const BlockRun& run, const std::atomic<uint64_t>* grant,
                              uint64_t generation) override {
    TANDEM_CUDA_CHECK(cudaSetDevice(device_));
    const size_t blocks = run.source_blocks.size();
    auto copy = std::make_unique<DeviceCopy>(
        device_, blocks, store_->AllocateStaging(DeviceCopy::ReportBytes(blocks)));
    PeerCopyArgs args;
    args.pool = pool_;
    args.peer = PlacesOf(peer_, memory_.data());
    args.layer_begin = run.layer_begin;
    args.layer_count = run.layer_count;
    args.head_begin = run.heads.begin;
    args.head_count = run.heads.count;
    args.page_bytes = static_cast<uint32_t>(peer_.layout.PageBytes());
    args.grant = reinterpret_cast<const uint64_t*>(control_.OnCard(grant));
    args.generation = generation;
    args.state = state_;
    args.revoked = copy->revoked();
    for (size_t first = 0; first < blocks; first += kMaxPairs) {
      const size_t count = std::min<size_t>(kMaxPairs, blocks - first);
      args.digests = copy->digests_from(first);
      args.num_pairs = static_cast<int>(count);
      for (size_t i = 0; i < count; ++i) {
        args.pairs[i] = {run.source_blocks[first + i], run.target_blocks[first + i]};
      }
      TANDEM_CUDA_CHECK(CopyToPeer(args, stream_));
    }
    TANDEM_CUDA_CHECK(cudaEventRecord(copy->end(), stream_));
    return copy;
  }

  absl::Status Probe(size_t bytes) override {
    TANDEM_CUDA_CHECK(cudaSetDevice(device_));
    const size_t most = std::min<uint64_t>(kProbeBytes, peer_.TotalBytes());
    if (scratch_ == nullptr && cudaMalloc(&scratch_, most) != cudaSuccess) {
      cudaGetLastError();
      return ResourceExhausted("the card has no {} bytes left", most);
    }
    for (size_t read = 0; read < bytes;) {
      const size_t n = std::min(most, bytes - read);
      TANDEM_CUDA_CHECK(cudaMemcpyAsync(scratch_, memory_.data(), n, cudaMemcpyDefault, stream_));
      read += n;
    }
    TANDEM_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return absl::OkStatus();
  }

 private:
  const KvStore* const store_;
  const PagePlaces pool_;
  const int device_;
  const KvPoolShape peer_;
  const PeerMemory memory_;
  const RegisteredPages control_;
  PeerCopyState* const state_;
  void* scratch_ = nullptr;  // of probes
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::string CardName(int device) {
  cudaDeviceProp properties = {};
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const std::string hex =
      absl::BytesToHexString({properties.uuid.bytes, sizeof(properties.uuid.bytes)});
  return fmt::format("GPU-{}-{}-{}-{}-{}", hex.substr(0, 8), hex.substr(8, 4), hex.substr(12, 4),
                     hex.substr(16, 4), hex.substr(20));
}

absl::Status CheckCanWrite(int device, const std::string& card) {
  int count = 0;
  TANDEM_CUDA_CHECK(cudaGetDeviceCount(&count));
  for (int other = 0; other < count; ++other) {
    if (CardName(other) != card) continue;
    int can = 0;
    if (other == device ||
        (cudaDeviceCanAccessPeer(&can, device, other) == cudaSuccess && can != 0)) {
      return absl::OkStatus();
    }
    return FailedPrecondition("card {} has no peer access to the peer's card {} ({})", device,
                              other, card);
  }
  return FailedPrecondition(
      "this process does not see the peer's card {} (CUDA_VISIBLE_DEVICES hides it?)", card);
}

absl::StatusOr<PeerMemory> PeerMemory::Map(int device, int fd, size_t bytes) {
  if (!::tandem::cuda::SharesMemory(device)) {
    return FailedPrecondition("the card cannot map memory of other processes");
  }
  const Driver& driver = TheDriver();
  PeerMemory memory;
  void* handle = reinterpret_cast<void*>(static_cast<uintptr_t>(fd));
  CUresult error =
      driver.import_handle(&memory.handle_, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (error != CUDA_SUCCESS) return DriverError("cuMemImportFromShareableHandle", error);
  CUmemAllocationProp what = {};
  error = driver.properties(&what, memory.handle_);
  if (error != CUDA_SUCCESS) return DriverError("cuMemGetAllocationPropertiesFromHandle", error);
  size_t granule = 0;
  error = driver.granularity(&granule, &what, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (error != CUDA_SUCCESS) return DriverError("cuMemGetAllocationGranularity", error);
  memory.size_ = (bytes + granule - 1) / granule * granule;
  error = driver.reserve(&memory.address_, memory.size_, granule, 0, 0);
  if (error != CUDA_SUCCESS) return DriverError("cuMemAddressReserve", error);
  error = driver.map(memory.address_, memory.size_, 0, memory.handle_, 0);
  if (error != CUDA_SUCCESS) return DriverError("cuMemMap", error);
  memory.mapped_ = true;
  CUmemAccessDesc access = {};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  error = driver.set_access(memory.address_, memory.size_, &access, 1);
  if (error != CUDA_SUCCESS) return DriverError("cuMemSetAccess", error);
  return memory;
}

PeerMemory::PeerMemory(PeerMemory&& other) noexcept
    : handle_(std::exchange(other.handle_, 0)),
      address_(std::exchange(other.address_, 0)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, false)) {}

PeerMemory::~PeerMemory() {
  const Driver& driver = TheDriver();
  if (mapped_) driver.unmap(address_, size_);
  if (address_ != 0) driver.free(address_, size_);
  if (handle_ != 0) driver.release(handle_);
}

absl::StatusOr<std::unique_ptr<PeerPool>> MapDevicePeer(const KvStore* store, std::byte* base,
                                                        int device, int fd, const KvPoolShape& peer,
                                                        std::span<std::byte> control) {
  TANDEM_CUDA_CHECK(cudaSetDevice(device));
  TANDEM_ASSIGN_OR_RETURN(PeerMemory memory, PeerMemory::Map(device, fd, peer.TotalBytes()));
  TANDEM_ASSIGN_OR_RETURN(RegisteredPages pages, RegisteredPages::Register(control));
  void* state = nullptr;
  if (cudaMalloc(&state, sizeof(PeerCopyState)) != cudaSuccess) {
    cudaGetLastError();
    return ResourceExhausted("the card has no {} bytes left", sizeof(PeerCopyState));
  }
  return std::make_unique<DevicePeer>(store, base, device, peer, std::move(memory),
                                      std::move(pages), static_cast<PeerCopyState*>(state));
}

}  // namespace tandem::kvtransfer::cuda
