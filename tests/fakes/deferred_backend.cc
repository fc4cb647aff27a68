#include "tests/fakes/deferred_backend.h"

#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "engine/device/cpu/cpu_device.h"
#include "engine/kernels/cpu/cpu_ops.h"

namespace tandem::engine {
namespace {

class DeferredEvent final : public Event {
 public:
  bool Ready() const override { return reached_.Ready(); }
  bool WaitFor(absl::Duration timeout) const override { return reached_.WaitFor(timeout); }
  void Set() { reached_.Set(); }

 private:
  HostEvent reached_;
};

struct DeferredGraph final : public Graph {
  std::vector<std::function<void()>> work;
};

// Does its work on a thread of its own, in order.
class DeferredStream final : public Stream {
 public:
  explicit DeferredStream(std::function<absl::Duration()> delay)
      : delay_(std::move(delay)), thread_([this] { Work(); }) {}
  ~DeferredStream() override {
    {
      absl::MutexLock lock(&mutex_);
      TANDEM_CHECK(queue_.empty() && !busy_, "a stream ends with work to do");
      stopping_ = true;
    }
    thread_.join();
  }

  void Give(std::function<void()> work) {
    if (recording_ != nullptr) {
      recording_->work.push_back(std::move(work));
      return;
    }
    absl::MutexLock lock(&mutex_);
    queue_.push_back(std::move(work));
  }
  void CopyToDevice(void* to, const void* from, size_t bytes) override {
    TANDEM_CHECK(recording_ == nullptr, "a graph reads memory of the host");
    Give([=] { std::memcpy(to, from, bytes); });
  }
  void CopyToHost(void* to, const void* from, size_t bytes) override {
    Give([=] { std::memcpy(to, from, bytes); });
  }
  std::unique_ptr<Graph> Capture(const std::function<void()>& work) override {
    auto graph = std::make_unique<DeferredGraph>();
    recording_ = graph.get();
    work();
    recording_ = nullptr;
    return graph;
  }
  void Launch(Graph* graph) override {
    for (const auto& work : static_cast<DeferredGraph*>(graph)->work) Give(work);
  }
  void Record(Event* event) override {
    TANDEM_CHECK(recording_ == nullptr, "an event in a graph");
    Give([event] { static_cast<DeferredEvent*>(event)->Set(); });
  }
  void Synchronize() override {
    absl::MutexLock lock(&mutex_);
    const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return queue_.empty() && !busy_;
    };
    mutex_.Await(absl::Condition(&idle));
  }

 private:
  void Work() {
    const auto wanted = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return stopping_ || !queue_.empty();
    };
    while (true) {
      std::function<void()> work;
      {
        absl::MutexLock lock(&mutex_);
        busy_ = false;
        mutex_.Await(absl::Condition(&wanted));
        if (stopping_) return;
        work = std::move(queue_.front());
        queue_.pop_front();
        busy_ = true;
      }
      absl::SleepFor(delay_());
      work();
    }
  }

  const std::function<absl::Duration()> delay_;
  DeferredGraph* recording_ = nullptr;
  absl::Mutex mutex_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

class DeferredDevice final : public Device {
 public:
  explicit DeferredDevice(std::function<absl::Duration()> delay)
      : cpu_({.num_threads = 1}), delay_(std::move(delay)) {}

  Threads& threads() { return cpu_.threads(); }
  std::string Describe() const override { return "deferred"; }
  bool asynchronous() const override { return true; }
  bool shares_host_memory() const override { return false; }
  bool has_bfloat16() const override { return cpu_.has_bfloat16(); }
  size_t TotalMemory() const override { return cpu_.TotalMemory(); }
  size_t AvailableMemory() const override { return cpu_.AvailableMemory(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return cpu_.Allocate(bytes); }
  absl::StatusOr<Buffer> AllocateKvPool(size_t bytes) override {
    return cpu_.AllocateKvPool(bytes);
  }
  absl::StatusOr<Buffer> AllocateStaging(size_t bytes) override { return cpu_.Allocate(bytes); }
  std::unique_ptr<Stream> NewStream() override { return std::make_unique<DeferredStream>(delay_); }
  std::shared_ptr<Event> NewEvent() override { return std::make_shared<DeferredEvent>(); }

 private:
  CpuDevice cpu_;
  const std::function<absl::Duration()> delay_;
};

// Arguments are copied when an op is called, as those of a kernel's launch are.
class DeferredOps final : public Ops {
 public:
  DeferredOps(const OpsShape& shape, Buffer scratch, Threads* threads)
      : cpu_(shape, std::move(scratch), threads) {}

  Element activation() const override { return cpu_.activation(); }
  size_t PackedWeightBytes(size_t n, size_t k) const override {
    return cpu_.PackedWeightBytes(n, k);
  }
  void PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                      size_t first_column, void* packed, Stream* stream) override {
    Give(stream, [=, this] {
      absl::MutexLock lock(&packing_);  // of several threads, which a CPU's ops do not have
      cpu_.PackWeightRows(source, source_element, rows, k, first_column, packed, stream);
    });
  }
  void Begin(const BeginArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, batch = *args.batch, s = stream]() mutable {
      a.batch = &batch;
      cpu_.Begin(a, s);
    });
  }
  void Qkv(const QkvArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, batch = *args.batch, s = stream]() mutable {
      a.batch = &batch;
      cpu_.Qkv(a, s);
    });
  }
  void Attention(const AttentionArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, batch = *args.batch, s = stream]() mutable {
      a.batch = &batch;
      cpu_.Attention(a, s);
    });
  }
  void SelectRows(const SelectRowsArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, s = stream] { cpu_.SelectRows(a, s); });
  }
  void AddProjection(const AddProjectionArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, s = stream] { cpu_.AddProjection(a, s); });
  }
  void GateUp(const GateUpArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, s = stream] { cpu_.GateUp(a, s); });
  }
  void Logits(const LogitsArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, s = stream] { cpu_.Logits(a, s); });
  }
  void Sample(const SampleArgs& args, Stream* stream) override {
    Give(stream, [this, a = args, s = stream] { cpu_.Sample(a, s); });
  }

 private:
  static void Give(Stream* stream, std::function<void()> work) {
    static_cast<DeferredStream*>(stream)->Give(std::move(work));
  }
  CpuOps cpu_;
  absl::Mutex packing_;
};

class DeferredBackend final : public Backend {
 public:
  explicit DeferredBackend(std::function<absl::Duration()> delay) : device_(std::move(delay)) {}

  std::string name() const override { return "deferred"; }
  Device& device() override { return device_; }
  absl::StatusOr<std::unique_ptr<Ops>> MakeOps(const OpsShape& shape) override {
    TANDEM_ASSIGN_OR_RETURN(Buffer scratch, device_.Allocate(CpuOps::ScratchBytes(shape)));
    return std::make_unique<DeferredOps>(shape, std::move(scratch), &device_.threads());
  }
  int max_in_flight() const override { return 2; }

 private:
  DeferredDevice device_;
};

}  // namespace

std::unique_ptr<Backend> MakeDeferredBackend(std::function<absl::Duration()> delay) {
  return std::make_unique<DeferredBackend>(std::move(delay));
}

}  // namespace tandem::engine
