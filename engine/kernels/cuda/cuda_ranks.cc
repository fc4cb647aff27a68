#include "engine/kernels/cuda/cuda_ranks.h"

#include <algorithm>
#include <array>
#include <cuda_runtime.h>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/status.h"
#include "engine/device/cuda/cuda_check.h"
#include "engine/kernels/cuda/rank_sum.h"

namespace tandem::engine::cuda {
namespace {

// Threads that wait for each other, until one says that it will not come.
class HostMeeting {
 public:
  explicit HostMeeting(int size) : size_(size) {}

  // False once it is aborted.
  bool Meet() {
    absl::MutexLock lock(&mutex_);
    const uint64_t round = round_;
    if (++here_ == size_) {
      here_ = 0;
      ++round_;
    }
    const auto over = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return aborted_ || round_ != round;
    };
    mutex_.Await(absl::Condition(&over));
    return !aborted_;
  }
  void Abort() {
    absl::MutexLock lock(&mutex_);
    aborted_ = true;
  }

 private:
  const int size_;
  absl::Mutex mutex_;
  int here_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t round_ ABSL_GUARDED_BY(mutex_) = 0;
  bool aborted_ ABSL_GUARDED_BY(mutex_) = false;
};

cudaStream_t Handle(Stream* stream) { return static_cast<CudaStream*>(stream)->handle(); }

class CudaRanks final : public Ranks {
 public:
  CudaRanks(std::span<CudaDevice* const> devices, bool shared, Buffer broken);

  Collective* at(int rank) const override { return ends_[static_cast<size_t>(rank)].get(); }
  void Abort() override {
    meeting_.Abort();
    __atomic_store_n(&broken()->why, SumBreak::kAborted, __ATOMIC_RELEASE);
  }
  absl::Status status() const override {
    const uint32_t why = __atomic_load_n(&broken()->why, __ATOMIC_ACQUIRE);
    if (why < SumBreak::kMissing) return absl::OkStatus();
    return Internal("rank {} of the model did not come to a sum over ranks within 20 s",
                    why - SumBreak::kMissing);
  }

 private:
  class End;

  SumBreak* broken() const { return broken_.as<SumBreak>(); }

  const bool shared_;  // some share a card
  const Buffer broken_;
  HostMeeting meeting_;
  // By rank; what a thread writes of its own the others read behind a meeting.
  std::vector<RankMailbox*> mailboxes_;
  std::vector<int> offers_;
  std::vector<SumPlace> places_;                    // of the sum under way, where cards are shared
  std::vector<std::array<cudaEvent_t, 2>> events_;  // before and behind the addition
  std::vector<std::unique_ptr<Collective>> ends_;
};

class CudaRanks::End final : public Collective {
 public:
  End(CudaRanks* ranks, int rank, CudaDevice* device)
      : ranks_(ranks), rank_(rank), device_(device) {
    device_->Use();
    for (cudaEvent_t& event : own_events()) {
      TANDEM_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  }
  ~End() override {
    for (const cudaEvent_t event : own_events()) cudaEventDestroy(event);
  }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_->ends_.size()); }
  bool recordable() const override { return !ranks_->shared_; }
  void Meet() override { ranks_->meeting_.Meet(); }
  int Least(int value) override {
    ranks_->offers_[index()] = value;
    Meet();
    const int least = *std::min_element(ranks_->offers_.begin(), ranks_->offers_.end());
    Meet();  // before any makes its next offer
    return least;
  }

  absl::Status Prepare(Device* device, size_t most) override {
    // Rank 0 adds to the values themselves.
    TANDEM_ASSIGN_OR_RETURN(part_, device->Allocate(rank_ == 0 ? kGapBytes : most * sizeof(float)));
    if (!ranks_->shared_) {
      TANDEM_ASSIGN_OR_RETURN(mailbox_, device->Allocate(RankMailbox::Bytes(size())));
      ranks_->mailboxes_[index()] = mailbox_.as<RankMailbox>();
    }
    if (!ranks_->meeting_.Meet()) {
      return absl::AbortedError("another rank of the model could not be made");
    }
    return absl::OkStatus();
  }

  float* BeginSum(float* values, size_t /*count*/, Stream* /*stream*/) override {
    return rank_ == 0 ? values : part_.as<float>();
  }

  void EndSum(float* values, size_t count, Stream* stream) override {
    const SumPlace place = {rank_ == 0 ? values : part_.as<float>(), values};
    if (ranks_->shared_) {
      AddInStreams(place, count, stream);
    } else {
      AddOnDevice(place, count, stream);
    }
  }

 private:
  static constexpr size_t kGapBytes = 16;

  size_t index() const { return static_cast<size_t>(rank_); }
  std::array<cudaEvent_t, 2>& own_events() { return ranks_->events_[index()]; }
  LaunchOptions Options(Stream* stream, bool overlap) const {
    return {.stream = Handle(stream),
            .multiprocessors = device_->multiprocessors(),
            .overlap = overlap && device_->compute_capability() >= 90};
  }

  void AddOnDevice(const SumPlace& place, size_t count, Stream* stream) {
    RankSumArgs sum;
    std::copy(ranks_->mailboxes_.begin(), ranks_->mailboxes_.end(), sum.mailboxes);
    sum.broken = ranks_->broken();
    sum.place = place;
    sum.count = static_cast<int64_t>(count);
    sum.rank = rank_;
    sum.ranks = size();
    TANDEM_CUDA_CHECK(
        (count <= kOneShotFloats ? OneShotSum : SumInPlace)(sum, Options(stream, true)));
  }

  void AddInStreams(const SumPlace& place, size_t count, Stream* stream) {
    ranks_->places_[index()] = place;
    if (!MeetInStreams(0, stream)) return;
    AddSlicesArgs add;
    std::copy(ranks_->places_.begin(), ranks_->places_.end(), add.places);
    add.count = static_cast<int64_t>(count);
    add.rank = rank_;
    add.ranks = size();
    TANDEM_CUDA_CHECK(AddSlices(add, Options(stream, false)));
    if (!MeetInStreams(1, stream)) return;
    // Also keeps apart what follows, which may be launched to start beside its predecessor, and
    // what it has to wait for.
    TANDEM_CUDA_CHECK(cudaMemsetAsync(
        part_.data(), 0, rank_ == 0 ? kGapBytes : count * sizeof(float), Handle(stream)));
  }

  // What every rank gave its stream before is done before what any gives behind it. An event is
  // recorded again only two meetings later: by then all have been told to wait for it.
  bool MeetInStreams(size_t which, Stream* stream) {
    TANDEM_CUDA_CHECK(cudaEventRecord(own_events()[which], Handle(stream)));
    if (!ranks_->meeting_.Meet()) return false;
    for (size_t other = 0; other < ranks_->events_.size(); ++other) {
      if (other == index()) continue;
      TANDEM_CUDA_CHECK(cudaStreamWaitEvent(Handle(stream), ranks_->events_[other][which], 0));
    }
    return true;
  }

  CudaRanks* const ranks_;
  const int rank_;
  CudaDevice* const device_;
  Buffer part_, mailbox_;
};

CudaRanks::CudaRanks(std::span<CudaDevice* const> devices, bool shared, Buffer broken)
    : shared_(shared),
      broken_(std::move(broken)),
      meeting_(static_cast<int>(devices.size())),
      mailboxes_(devices.size()),
      offers_(devices.size()),
      places_(devices.size()),
      events_(devices.size()) {
  for (size_t rank = 0; rank < devices.size(); ++rank) {
    ends_.push_back(std::make_unique<End>(this, static_cast<int>(rank), devices[rank]));
  }
}

// Of two cards.
absl::Status LetReach(CudaDevice* from, const CudaDevice& to) {
  int can = 0;
  TANDEM_CUDA_CHECK(cudaDeviceCanAccessPeer(&can, from->ordinal(), to.ordinal()));
  if (can == 0) {
    return FailedPrecondition(
        "GPU {} cannot read the memory of GPU {} (`nvidia-smi topo -p2p r` shows which can), and "
        "a model cannot be split over such a pair so far; give each its own worker with "
        "--prefill N and --decode N, or name GPUs that can by --devices",
        from->ordinal(), to.ordinal());
  }
  from->Use();
  const cudaError_t error = cudaDeviceEnablePeerAccess(to.ordinal(), 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return absl::OkStatus();
  }
  if (error == cudaSuccess) return absl::OkStatus();
  return FailedPrecondition("GPU {} reaching the memory of GPU {}: {}", from->ordinal(),
                            to.ordinal(), cudaGetErrorString(error));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Ranks>> MakeCudaRanks(std::span<CudaDevice* const> devices) {
  if (devices.size() > kMaxCudaRanks) {
    return InvalidArgument("--tensor-parallel-size={}: on GPUs it is {} at most", devices.size(),
                           kMaxCudaRanks);
  }
  bool shared = false;
  for (size_t i = 0; i < devices.size(); ++i) {
    if (!devices[i]->IsOfKind(*devices.front())) {
      return InvalidArgument(
          "a model is split over GPUs of one kind, or its ranks would draw different tokens: GPU "
          "{} is {}, GPU {} is {}",
          devices.front()->ordinal(), devices.front()->Describe(), devices[i]->ordinal(),
          devices[i]->Describe());
    }
    for (size_t j = 0; j < i; ++j) {
      if (devices[i]->ordinal() == devices[j]->ordinal()) {
        devices[i]->ShareStream(devices[j]);
        shared = true;
        continue;
      }
      TANDEM_RETURN_IF_ERROR(LetReach(devices[i], *devices[j]));
      TANDEM_RETURN_IF_ERROR(LetReach(devices[j], *devices[i]));
    }
  }
  TANDEM_ASSIGN_OR_RETURN(Buffer broken, devices.front()->AllocateStaging(sizeof(SumBreak)));
  return std::make_unique<CudaRanks>(devices, shared, std::move(broken));
}

}  // namespace tandem::engine::cuda
