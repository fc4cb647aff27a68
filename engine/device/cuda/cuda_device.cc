#include "engine/device/cuda/cuda_device.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sys/prctl.h>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "common/base/status.h"
#include "engine/device/cuda/cuda_check.h"
#include "engine/device/cuda/cuda_memory.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kLeastCapability = 80;
// How long a thread asks for an event without pause before it begins to sleep between questions,
// and how long it sleeps: a step of some milliseconds is seen to end within some 10 us, for a few
// percent of a core.
constexpr absl::Duration kSpin = absl::Microseconds(50);
constexpr absl::Duration kShortSleep = absl::Microseconds(10);
// Later ones are longer.
constexpr absl::Duration kLongWait = absl::Milliseconds(100);
constexpr absl::Duration kLongSleep = absl::Microseconds(100);

std::string Version(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

// Makes `ordinal` the calling thread's card. Others may have made it another one: CUDA is asked.
void UseCard(int ordinal) {
  thread_local bool has_context = false;
  int current = -1;
  if (has_context && cudaGetDevice(&current) == cudaSuccess && current == ordinal) return;
  TANDEM_CUDA_CHECK(cudaSetDevice(ordinal));
  has_context = true;
}

// A thread's sleeps otherwise last 50 us longer than asked for.
void SleepExactly(absl::Duration duration) {
  thread_local const bool exact = prctl(PR_SET_TIMERSLACK, 1UL) == 0;
  (void)exact;
  const timespec time = absl::ToTimespec(duration);
  nanosleep(&time, nullptr);
}

int64_t FaultStep() {
  static const int64_t step = [] {
    const char* text = std::getenv("TANDEM_CUDA_FAULT_STEP");
    return text != nullptr ? std::atoll(text) : int64_t{-1};
  }();
  return step;
}

// An error of an allocation: what there is too little of is said by who asked.
absl::Status NoMemory(const char* call, cudaError_t error, size_t bytes) {
  cudaGetLastError();  // it is dealt with
  if (error != cudaErrorMemoryAllocation) {
    return Internal("{} of {} bytes: {}", call, bytes, cudaGetErrorString(error));
  }
  size_t available = 0, total = 0;
  cudaMemGetInfo(&available, &total);
  return ResourceExhausted("{} bytes of the card's memory cannot be had; {} of {} are free", bytes,
                           available, total);
}

// Streams do not wait for each other, nor for what is given to no stream, so this must be over
// before the memory is given out.
absl::Status Zero(void* data, size_t bytes) {
  TANDEM_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, cudaStreamPerThread));
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckDriver(int driver, int built_with) {
  if (driver == 0) {
    return FailedPrecondition(
        "no NVIDIA driver is installed (libcuda.so.1 was not found); it must support CUDA {}",
        Version(built_with));
  }
  // A driver serves all minor versions of its major one.
  if (driver / 1000 >= built_with / 1000) return absl::OkStatus();
  return FailedPrecondition(
      "the NVIDIA driver supports CUDA {}, this program needs {}: install a newer driver",
      Version(driver), Version(built_with / 1000 * 1000));
}

absl::Status CheckCard(const std::string& name, int compute_capability) {
  if (compute_capability >= kLeastCapability) return absl::OkStatus();
  return FailedPrecondition(
      "{} has compute capability {}.{}; 8.0 is needed (Ampere, Ada, Hopper or newer)", name,
      compute_capability / 10, compute_capability % 10);
}

// Creating an event costs some microseconds, and every layer of a step may want one.
class CudaDevice::EventPool {
 public:
  explicit EventPool(int ordinal) : ordinal_(ordinal) {}
  ~EventPool() {
    for (const cudaEvent_t event : free_) cudaEventDestroy(event);
  }

  cudaEvent_t Take() {
    absl::MutexLock lock(&mutex_);
    if (free_.empty()) {
      UseCard(ordinal_);
      cudaEvent_t event;
      TANDEM_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      return event;
    }
    const cudaEvent_t event = free_.back();
    free_.pop_back();
    return event;
  }
  void GiveBack(cudaEvent_t event) {
    absl::MutexLock lock(&mutex_);
    free_.push_back(event);
  }

 private:
  const int ordinal_;
  absl::Mutex mutex_;
  std::vector<cudaEvent_t> free_ ABSL_GUARDED_BY(mutex_);
};

class CudaDevice::CudaEvent final : public Event {
 public:
  CudaEvent(int ordinal, std::shared_ptr<EventPool> pool)
      : ordinal_(ordinal), pool_(std::move(pool)), event_(pool_->Take()) {}
  ~CudaEvent() override { pool_->GiveBack(event_); }

  bool Ready() const override {
    if (reached_.load(std::memory_order_acquire)) return true;
    return recorded_.Ready() && Ask();
  }

  bool WaitFor(absl::Duration timeout) const override {
    if (reached_.load(std::memory_order_acquire)) return true;
    const absl::Time begin = absl::Now(), deadline = begin + timeout;
    if (!recorded_.WaitFor(timeout)) return false;
    const absl::Time asked = absl::Now();
    while (!Ask()) {
      const absl::Time now = absl::Now();
      if (now >= deadline) return false;
      if (now - asked < kSpin) continue;
      SleepExactly(std::min(deadline - now, now - asked < kLongWait ? kShortSleep : kLongSleep));
    }
    return true;
  }

  void RecordOn(cudaStream_t stream) {
    TANDEM_CUDA_CHECK(cudaEventRecord(event_, stream));
    recorded_.Set();
  }

 private:
  // Of a recorded event.
  bool Ask() const {
    UseCard(ordinal_);
    const cudaError_t state = cudaEventQuery(event_);
    if (state == cudaErrorNotReady) {
      // No error: who asks for the last one after a launch must not find this.
      (void)cudaGetLastError();
      return false;
    }
    CheckCuda(state, "cudaEventQuery", __FILE__, __LINE__);
    reached_.store(true, std::memory_order_release);
    return true;
  }

  const int ordinal_;
  const std::shared_ptr<EventPool> pool_;
  const cudaEvent_t event_;
  HostEvent recorded_;
  mutable std::atomic<bool> reached_{false};
};

namespace {

struct CudaGraph final : public Graph {
  ~CudaGraph() override { cudaGraphExecDestroy(exec); }
  cudaGraphExec_t exec = nullptr;
};

}  // namespace

CudaStream::SharedHandle CudaStream::NewHandle(int ordinal) {
  UseCard(ordinal);
  cudaStream_t stream = nullptr;
  TANDEM_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return {stream, [](cudaStream_t ended) { cudaStreamDestroy(ended); }};
}

void CudaStream::BeginStep(int64_t step) {
  UseCard(ordinal_);
  current_step = step;
  if (step == FaultStep()) {
    DieOfCudaError("TANDEM_CUDA_FAULT_STEP", "injected fault", __FILE__, __LINE__);
  }
}

void CudaStream::CopyToDevice(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  UseCard(ordinal_);
  TANDEM_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, handle()));
}

void CudaStream::CopyToHost(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  UseCard(ordinal_);
  TANDEM_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, handle()));
}

void CudaStream::Record(Event* event) {
  UseCard(ordinal_);
  static_cast<CudaDevice::CudaEvent*>(event)->RecordOn(handle());
}

std::unique_ptr<Graph> CudaStream::Capture(const std::function<void()>& work) {
  UseCard(ordinal_);
  TANDEM_CUDA_CHECK(cudaStreamBeginCapture(handle(), cudaStreamCaptureModeThreadLocal));
  work();
  cudaGraph_t graph = nullptr;
  TANDEM_CUDA_CHECK(cudaStreamEndCapture(handle(), &graph));
  auto recorded = std::make_unique<CudaGraph>();
  TANDEM_CUDA_CHECK(cudaGraphInstantiate(&recorded->exec, graph, 0));
  TANDEM_CUDA_CHECK(cudaGraphDestroy(graph));
  TANDEM_CUDA_CHECK(cudaGraphUpload(recorded->exec, handle()));
  return recorded;
}

void CudaStream::Launch(Graph* graph) {
  UseCard(ordinal_);
  TANDEM_CUDA_CHECK(cudaGraphLaunch(static_cast<CudaGraph*>(graph)->exec, handle()));
}

void CudaStream::Synchronize() {
  UseCard(ordinal_);
  TANDEM_CUDA_CHECK(cudaStreamSynchronize(handle()));
}

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Open(int ordinal) {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  TANDEM_RETURN_IF_ERROR(CheckDriver(driver, runtime));
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return FailedPrecondition("there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it");
  }
  if (error != cudaSuccess) {
    return FailedPrecondition("the NVIDIA driver (CUDA {}) does not answer: {}", Version(driver),
                              cudaGetErrorString(error));
  }
  if (ordinal < 0 || ordinal >= count) {
    return InvalidArgument("GPU {}: this process sees {} GPUs, 0 to {}", ordinal, count, count - 1);
  }
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) {
    return FailedPrecondition("GPU {}: {}", ordinal, cudaGetErrorString(error));
  }
  TANDEM_RETURN_IF_ERROR(CheckCard(properties.name, 10 * properties.major + properties.minor));
  // Creates the context, which takes memory: a full card is found here.
  error = cudaSetDevice(ordinal);
  size_t available = 0, total = 0;
  if (error == cudaSuccess) error = cudaMemGetInfo(&available, &total);
  if (error != cudaSuccess) {
    return FailedPrecondition("GPU {} ({}) cannot be used: {}; nvidia-smi shows who uses it",
                              ordinal, properties.name, cudaGetErrorString(error));
  }
  return std::unique_ptr<CudaDevice>(new CudaDevice(ordinal, properties, driver));
}

CudaDevice::CudaDevice(int ordinal, const cudaDeviceProp& properties, int driver_version)
    : ordinal_(ordinal),
      properties_(properties),
      driver_version_(driver_version),
      events_(std::make_shared<EventPool>(ordinal)),
      allocated_(std::make_shared<std::atomic<size_t>>(0)) {}

CudaDevice::~CudaDevice() = default;

void CudaDevice::Use() const { UseCard(ordinal_); }

std::string CudaDevice::Describe() const {
  return fmt::format(
      "cuda, {} ({:.1f} GiB, {} multiprocessors, compute capability {}.{}, driver "
      "of CUDA {})",
      properties_.name, static_cast<double>(properties_.totalGlobalMem) / (1024.0 * 1024 * 1024),
      properties_.multiProcessorCount, properties_.major, properties_.minor,
      Version(driver_version_));
}

size_t CudaDevice::TotalMemory() const { return properties_.totalGlobalMem; }

size_t CudaDevice::AvailableMemory() const {
  UseCard(ordinal_);
  size_t available = 0, total = 0;
  TANDEM_CUDA_CHECK(cudaMemGetInfo(&available, &total));
  return available;
}

Buffer CudaDevice::Counted(Buffer buffer) {
  void* data = buffer.data();
  const size_t size = buffer.size();
  const int fd = buffer.fd();
  *allocated_ += size;
  auto inner = std::make_shared<Buffer>(std::move(buffer));
  return Buffer(data, size, fd, [inner, counter = allocated_, size]() {
    *inner = Buffer();
    *counter -= size;
  });
}

absl::StatusOr<Buffer> CudaDevice::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer();
  UseCard(ordinal_);
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error != cudaSuccess) return NoMemory("cudaMalloc", error, bytes);
  Buffer buffer(data, bytes, -1, [data, ordinal = ordinal_] {
    UseCard(ordinal);
    cudaFree(data);
  });
  TANDEM_RETURN_IF_ERROR(Zero(data, bytes));
  return Counted(std::move(buffer));
}

absl::StatusOr<Buffer> CudaDevice::AllocateKvPool(size_t bytes) {
  UseCard(ordinal_);
  absl::StatusOr<Buffer> pool = AllocateExportable(ordinal_, bytes);
  if (absl::IsUnimplemented(pool.status())) {
    pool = Allocate(bytes);
  } else if (pool.ok()) {
    pool = Counted(*std::move(pool));
  }
  if (absl::IsResourceExhausted(pool.status())) {
    return ResourceExhausted(
        "a KV pool: {}; lower --kv-cache-memory-bytes or --gpu-memory-utilization",
        MessageOf(pool.status()));
  }
  TANDEM_RETURN_IF_ERROR(pool.status());
  TANDEM_RETURN_IF_ERROR(Zero(pool->data(), bytes));
  return pool;
}

absl::StatusOr<Buffer> CudaDevice::AllocateStaging(size_t bytes) {
  if (bytes == 0) return Buffer();
  UseCard(ordinal_);
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return ResourceExhausted("{} bytes of page-locked memory of the host cannot be had: {}", bytes,
                             cudaGetErrorString(error));
  }
  std::memset(data, 0, bytes);
  return Buffer(data, bytes, -1, [data, ordinal = ordinal_] {
    UseCard(ordinal);
    cudaFreeHost(data);
  });
}

std::unique_ptr<Stream> CudaDevice::NewStream() {
  return std::make_unique<CudaStream>(
      ordinal_, common_stream_ != nullptr ? common_stream_ : CudaStream::NewHandle(ordinal_));
}

bool CudaDevice::IsOfKind(const CudaDevice& other) const {
  return compute_capability() == other.compute_capability() &&
         multiprocessors() == other.multiprocessors() &&
         properties_.sharedMemPerBlockOptin == other.properties_.sharedMemPerBlockOptin;
}

void CudaDevice::ShareStream(CudaDevice* other) {
  if (other->common_stream_ == nullptr) other->common_stream_ = CudaStream::NewHandle(ordinal_);
  common_stream_ = other->common_stream_;
}

std::shared_ptr<Event> CudaDevice::NewEvent() {
  return std::make_shared<CudaEvent>(ordinal_, events_);
}

}  // namespace tandem::engine::cuda
