#include "engine/device/cpu/cpu_device.h"

#include <cerrno>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "fmt/format.h"

#include "common/base/cpu_features.h"
#include "common/base/host_memory.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

class CpuEvent final : public Event {
 public:
  bool Ready() const override { return recorded_.Ready(); }
  bool WaitFor(absl::Duration timeout) const override { return recorded_.WaitFor(timeout); }
  void Set() { recorded_.Set(); }

 private:
  HostEvent recorded_;
};

class CpuStream final : public Stream {
 public:
  void CopyToDevice(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  void CopyToHost(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  void Record(Event* event) override { static_cast<CpuEvent*>(event)->Set(); }
  void Synchronize() override {}

 private:
  // Nothing may lie at a null pointer, which memcpy does not take even for no bytes.
  static void Copy(void* to, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

CpuDevice::CpuDevice(const CpuDeviceOptions& options)
    : threads_(options.num_threads > 0 ? options.num_threads : PhysicalCores()) {}

std::string CpuDevice::Describe() const { return fmt::format("cpu, {} threads", threads_.count()); }

bool CpuDevice::has_bfloat16() const { return CpuHasBF16(); }

size_t CpuDevice::TotalMemory() const { return ReadHostMemory().total; }

size_t CpuDevice::AvailableMemory() const { return ReadHostMemory().available; }

absl::StatusOr<Buffer> CpuDevice::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer();
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return ResourceExhausted("{} bytes of memory cannot be had: {}", bytes, strerror(errno));
  }
  madvise(data, bytes, MADV_HUGEPAGE);
  return Buffer(data, bytes, -1, [data, bytes] { munmap(data, bytes); });
}

absl::StatusOr<Buffer> CpuDevice::AllocateKvPool(size_t bytes) {
  const auto refusal = [bytes](const char* what) {
    return ResourceExhausted(
        "a KV pool of {} bytes cannot be {}: {}; give a smaller one with "
        "--kv-cache-memory-bytes",
        bytes, what, strerror(errno));
  };
  const int fd = memfd_create("tandem-kv", MFD_CLOEXEC);
  if (fd < 0) return refusal("had");
  auto descriptor = std::make_shared<Buffer>(nullptr, 0, fd, [fd] { close(fd); });
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) return refusal("had");
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return refusal("mapped");
  return Buffer(data, bytes, fd, [data, bytes, descriptor] { munmap(data, bytes); });
}

std::unique_ptr<Stream> CpuDevice::NewStream() { return std::make_unique<CpuStream>(); }

std::shared_ptr<Event> CpuDevice::NewEvent() { return std::make_shared<CpuEvent>(); }

}  // namespace tandem::engine
