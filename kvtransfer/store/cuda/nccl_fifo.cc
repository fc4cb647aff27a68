// Two communicators, because of what NCCL's two kinds cost. One that does not block can be given up
// at any time, also while it is made and the peer never comes, but starts a thread for every call:
// 150 us for a frame that takes 47 over NVLink. A blocking one enqueues in microseconds, but waits
// inside NCCL for the peer while it is made and connected, and cannot be given up meanwhile. So the
// first kind is made, and the second split from it: they share the flag by which NCCL gives up, and
// aborting the first ends a call that waits in the second.
//
// Whatever may wait for the peer inside NCCL is done by a thread of the FIFO's own; others wait for
// that, and for the card, in slices, so that every wait ends with the FIFO or after its patience.
#include "kvtransfer/store/cuda/nccl_fifo.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <deque>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "common/cuda/nccl_library.h"
#include "kvtransfer/store/cuda/device_peer.h"
#include "kvtransfer/store/cuda/staging_lanes.h"

namespace tandem::kvtransfer::cuda {
namespace {

using ::tandem::cuda::FindNccl;
using ::tandem::cuda::Nccl;

// What a frame takes over NVLink; then sleeps, for a slow way need not cost a processor.
constexpr absl::Duration kSpin = absl::Microseconds(200);
constexpr absl::Duration kSlice = absl::Microseconds(50);
// Between two looks while it spins: the driver takes one caller at a time, and others launch.
constexpr absl::Duration kLook = absl::Microseconds(3);
constexpr char kEnded[] = "the link over NCCL has ended";

class NcclFifo final : public PeerFifo {
 public:
  NcclFifo(const Nccl* nccl, const KvLayout& layout, FifoEnd end, absl::Duration patience,
           std::unique_ptr<StagingLanes> lanes)
      : nccl_(nccl),
        layout_(layout),
        peer_(end == FifoEnd::kWriter ? 1 : 0),
        patience_(patience),
        lanes_(std::move(lanes)) {}
  ~NcclFifo() override {
    Abort();
    if (maker_.joinable()) maker_.join();
    if (split_ != nullptr) (void)nccl_->abort(split_);
  }

  absl::Status Join(const std::string& id);
  absl::Status AwaitPeer() override;
  std::unique_ptr<Gathering> Gather(const BlockRun& run) override;
  std::unique_ptr<Fetched> Fetch(size_t bytes) override;
  absl::Status ProbeOut(size_t bytes, std::span<const std::byte> pattern) override;
  absl::StatusOr<std::vector<std::byte>> ProbeIn(size_t bytes, bool wanted) override;
  void Abort() override;

 private:
  class NcclGathering;
  class NcclFetched;
  // A probe that has been sent.
  struct Probe {
    explicit Probe(StagingLanes* lanes) : lane(lanes) {}
    const StagingLanes::Lease lane;
  };

  // What a call of NCCL has said.
  absl::Status StatusOf(ncclResult_t result) const;
  // The thread `maker_`: from a communicator that was begun to one that is connected.
  absl::Status Make();
  // Until what was asked of the communicator that does not block has been done.
  absl::Status Settle();
  // Asks for something on the communicator that blocks, if there is one.
  template <typename Call>
  absl::Status Ask(Call call) ABSL_LOCKS_EXCLUDED(mutex_);
  // Sends or takes the lane's buffer, and marks its end on the lane's stream.
  absl::Status Send(const StagingLanes::Lease& lane, size_t bytes);
  absl::Status Receive(const StagingLanes::Lease& lane, size_t bytes);
  // Until the lane's stream has come to its end.
  absl::Status AwaitEnd(const StagingLanes::Lease& lane);
  // Waits in slices until `done` says so: OK; UNAVAILABLE once the FIFO has been aborted, which it
  // is after the patience.
  template <typename Done>
  absl::Status AwaitOrAbort(Done done);

  const Nccl* const nccl_;
  const KvLayout layout_;
  const int peer_;  // its rank
  const absl::Duration patience_;
  const std::unique_ptr<StagingLanes> lanes_;
  std::deque<std::unique_ptr<Probe>> probes_;  // of the writer's thread
  std::atomic<bool> aborted_ = false;
  std::atomic<bool> made_ = false;  // or failed: made_status_ is there
  absl::Status made_status_;
  absl::Mutex root_mutex_;  // NCCL takes one call on a communicator at a time
  ncclComm_t root_ ABSL_GUARDED_BY(root_mutex_) = nullptr;  // does not block
  absl::Mutex mutex_;
  ncclComm_t communicator_ ABSL_GUARDED_BY(mutex_) = nullptr;  // blocks
  ncclComm_t split_ = nullptr;  // NCCL writes it, until the root has settled or been aborted
  std::thread maker_;
};

class NcclFifo::NcclGathering final : public Gathering {
 public:
  NcclGathering(NcclFifo* fifo, const BlockRun& run)
      : fifo_(fifo), lane_(fifo->lanes_.get()), digests_(run) {
    fifo_->lanes_->Gather(lane_, run, lane_->buffer);
    sent_ = fifo_->Send(lane_, run.Bytes(fifo_->layout_));
  }
  absl::Status Wait() override {
    TANDEM_RETURN_IF_ERROR(sent_);
    TANDEM_RETURN_IF_ERROR(fifo_->AwaitEnd(lane_));
    digests_.Take(lane_);
    return absl::OkStatus();
  }
  std::span<const uint64_t> digests() const override { return digests_.by_block(); }

 private:
  NcclFifo* const fifo_;
  const StagingLanes::Lease lane_;
  StagingLanes::Digests digests_;
  absl::Status sent_;
};

class NcclFifo::NcclFetched final : public Fetched {
 public:
  NcclFetched(NcclFifo* fifo, size_t bytes) : fifo_(fifo), lane_(fifo->lanes_.get()) {
    taken_ = fifo_->Receive(lane_, bytes);
  }
  absl::Status Wait() override {
    TANDEM_RETURN_IF_ERROR(taken_);
    return fifo_->AwaitEnd(lane_);
  }
  void Scatter(std::span<const CopyPiece> pieces) override {
    fifo_->lanes_->Scatter(lane_, lane_->buffer, pieces);
  }

 private:
  NcclFifo* const fifo_;
  const StagingLanes::Lease lane_;
  absl::Status taken_;
};

absl::Status NcclFifo::Join(const std::string& id) {
  ncclUniqueId unique = {};
  if (id.size() != sizeof(unique)) return InvalidArgument("an id of {} bytes", id.size());
  std::memcpy(&unique, id.data(), sizeof(unique));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.splitShare = 1;
  TANDEM_CUDA_CHECK(cudaSetDevice(lanes_->device()));
  {
    absl::MutexLock lock(&root_mutex_);
    TANDEM_RETURN_IF_ERROR(StatusOf(nccl_->init_rank(&root_, 2, unique, 1 - peer_, &config)));
  }
  maker_ = std::thread([this] {
    made_status_ = Make();
    made_ = true;
  });
  return absl::OkStatus();
}

absl::Status NcclFifo::Make() {
  TANDEM_CUDA_CHECK(cudaSetDevice(lanes_->device()));
  TANDEM_RETURN_IF_ERROR(Settle());
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 1;
  {
    absl::MutexLock lock(&root_mutex_);
    if (root_ == nullptr) return Unavailable(kEnded);
    TANDEM_RETURN_IF_ERROR(
        StatusOf(nccl_->split(root_, /*color=*/0, /*key=*/1 - peer_, &split_, &config)));
  }
  TANDEM_RETURN_IF_ERROR(Settle());
  {
    absl::MutexLock lock(&mutex_);
    communicator_ = std::exchange(split_, nullptr);
  }
  // The first bytes connect the two.
  const StagingLanes::Lease lane(lanes_.get());
  TANDEM_RETURN_IF_ERROR(peer_ == 1 ? Send(lane, 1) : Receive(lane, 1));
  return AwaitEnd(lane);
}

absl::Status NcclFifo::AwaitPeer() {
  TANDEM_RETURN_IF_ERROR(AwaitOrAbort([this] { return made_.load(); }));
  return made_status_;
}

absl::Status NcclFifo::StatusOf(ncclResult_t result) const {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  return Unavailable("NCCL: {} (NCCL_DEBUG=WARN says more)", nccl_->error_string(result));
}

template <typename Done>
absl::Status NcclFifo::AwaitOrAbort(Done done) {
  const absl::Time begin = Clock::Real()->Now();
  while (!done()) {
    if (aborted_) return Unavailable(kEnded);
    const absl::Duration waited = Clock::Real()->Now() - begin;
    if (waited >= patience_) {
      Abort();
      return Unavailable("the peer has done nothing over NCCL for {}",
                         absl::FormatDuration(patience_));
    }
    if (waited > kSpin) absl::SleepFor(kSlice);
    while (Clock::Real()->Now() - begin < waited + kLook) {
    }
  }
  return aborted_ ? Unavailable(kEnded) : absl::OkStatus();
}

absl::Status NcclFifo::Settle() {
  ncclResult_t state = ncclSuccess;
  TANDEM_RETURN_IF_ERROR(AwaitOrAbort([&] {
    absl::MutexLock lock(&root_mutex_);
    if (root_ == nullptr) return true;
    const ncclResult_t asked = nccl_->async_error(root_, &state);
    if (asked != ncclSuccess) state = asked;
    return state != ncclInProgress;
  }));
  return StatusOf(state);
}

template <typename Call>
absl::Status NcclFifo::Ask(Call call) {
  absl::MutexLock lock(&mutex_);
  return communicator_ != nullptr ? StatusOf(call(communicator_)) : Unavailable(kEnded);
}

absl::Status NcclFifo::Send(const StagingLanes::Lease& lane, size_t bytes) {
  TANDEM_RETURN_IF_ERROR(Ask([&](ncclComm_t communicator) {
    return nccl_->send(lane->buffer, bytes, ncclUint8, peer_, communicator, lane->stream);
  }));
  TANDEM_CUDA_CHECK(cudaEventRecord(lane->end, lane->stream));
  return absl::OkStatus();
}

absl::Status NcclFifo::Receive(const StagingLanes::Lease& lane, size_t bytes) {
  TANDEM_RETURN_IF_ERROR(Ask([&](ncclComm_t communicator) {
    return nccl_->receive(lane->buffer, bytes, ncclUint8, peer_, communicator, lane->stream);
  }));
  TANDEM_CUDA_CHECK(cudaEventRecord(lane->end, lane->stream));
  return absl::OkStatus();
}

absl::Status NcclFifo::AwaitEnd(const StagingLanes::Lease& lane) {
  TANDEM_CUDA_CHECK(cudaSetDevice(lanes_->device()));
  TANDEM_RETURN_IF_ERROR(AwaitOrAbort([&] {
    const cudaError_t state = cudaEventQuery(lane->end);
    if (state == cudaErrorNotReady) return false;
    TANDEM_CUDA_CHECK(state);
    return true;
  }));
  // What a lost peer has left behind ends too, but is not what was sent.
  return Ask([&](ncclComm_t communicator) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = nccl_->async_error(communicator, &state);
    return asked != ncclSuccess ? asked : state;
  });
}

std::unique_ptr<Gathering> NcclFifo::Gather(const BlockRun& run) {
  probes_.clear();
  return std::make_unique<NcclGathering>(this, run);
}

std::unique_ptr<Fetched> NcclFifo::Fetch(size_t bytes) {
  return std::make_unique<NcclFetched>(this, bytes);
}

absl::Status NcclFifo::ProbeOut(size_t bytes, std::span<const std::byte> pattern) {
  if (probes_.size() == kStagedDepth) {
    TANDEM_RETURN_IF_ERROR(AwaitEnd(probes_.front()->lane));
    probes_.pop_front();
  }
  probes_.push_back(std::make_unique<Probe>(lanes_.get()));
  const StagingLanes::Lease& lane = probes_.back()->lane;
  if (!pattern.empty()) {
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(lane->buffer, pattern.data(), pattern.size(),
                                      cudaMemcpyHostToDevice, lane->stream));
  }
  return Send(lane, bytes);
}

absl::StatusOr<std::vector<std::byte>> NcclFifo::ProbeIn(size_t bytes, bool wanted) {
  const StagingLanes::Lease lane(lanes_.get());
  TANDEM_RETURN_IF_ERROR(Receive(lane, bytes));
  TANDEM_RETURN_IF_ERROR(AwaitEnd(lane));
  std::vector<std::byte> came(wanted ? bytes : 0);
  if (wanted) {
    TANDEM_CUDA_CHECK(
        cudaMemcpyAsync(came.data(), lane->buffer, bytes, cudaMemcpyDeviceToHost, lane->stream));
    TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane->stream));
  }
  return came;
}

void NcclFifo::Abort() {
  aborted_ = true;
  {
    // What waits for the peer in the other communicator ends, on the card too.
    absl::MutexLock lock(&root_mutex_);
    if (root_ != nullptr) (void)nccl_->abort(root_);
    root_ = nullptr;
  }
  absl::MutexLock lock(&mutex_);
  if (communicator_ != nullptr) (void)nccl_->abort(communicator_);
  communicator_ = nullptr;
}

}  // namespace

absl::StatusOr<std::string> NcclPlace(int device) {
  TANDEM_RETURN_IF_ERROR(FindNccl().status());
  // NCCL takes processes for ones of different hosts where this differs.
  const char* host = std::getenv("NCCL_HOSTID");
  return fmt::format("{}@{}", CardName(device),
                     std::string_view(host != nullptr ? host : "").substr(0, 50));
}

absl::StatusOr<std::string> NewNcclId(int device) {
  TANDEM_ASSIGN_OR_RETURN(const Nccl* const nccl, FindNccl());
  TANDEM_CUDA_CHECK(cudaSetDevice(device));
  ncclUniqueId id;
  if (const ncclResult_t made = nccl->get_unique_id(&id); made != ncclSuccess) {
    return Unavailable("NCCL: {} (NCCL_DEBUG=WARN says more)", nccl->error_string(made));
  }
  return std::string(id.internal, sizeof(id.internal));
}

absl::StatusOr<std::unique_ptr<PeerFifo>> JoinNccl(const KvRegion& region, int device,
                                                   const std::string& id, FifoEnd end,
                                                   size_t max_copy_bytes, absl::Duration patience) {
  TANDEM_ASSIGN_OR_RETURN(const Nccl* const nccl, FindNccl());
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<StagingLanes> lanes,
                          StagingLanes::Open(region, device, max_copy_bytes));
  auto fifo = std::make_unique<NcclFifo>(nccl, region.layout, end, patience, std::move(lanes));
  TANDEM_RETURN_IF_ERROR(fifo->Join(id));
  return fifo;
}

}  // namespace tandem::kvtransfer::cuda
