#include "engine/device/cpu/host_memory.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <utility>

#include "common/base/status.h"

namespace tandem::engine {
namespace {

// The number in a file that holds just one; false where there is none ("max").
bool ReadNumber(const char* path, size_t* value) {
  std::ifstream file(path);
  return static_cast<bool>(file >> *value);
}

size_t MachineMemory(const std::string& which) {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (size_t value = 0; file >> key >> value;) {
    if (key == which) return value * 1024;
    std::getline(file, unit);
  }
  return size_t{1} << 30;
}

// Pages of files (weights just read, for one) that the kernel gives up before it refuses memory.
size_t ReclaimableCache() {
  std::ifstream file("/sys/fs/cgroup/memory.stat");
  std::string key;
  for (size_t value = 0; file >> key >> value;) {
    if (key == "inactive_file") return value;
  }
  return 0;
}

}  // namespace

size_t TotalHostMemory() {
  const size_t total = MachineMemory("MemTotal:");
  size_t limit = 0;
  return ReadNumber("/sys/fs/cgroup/memory.max", &limit) ? std::min(total, limit) : total;
}

size_t AvailableHostMemory() {
  const size_t available = MachineMemory("MemAvailable:");
  size_t limit = 0, used = 0;
  if (!ReadNumber("/sys/fs/cgroup/memory.max", &limit) ||
      !ReadNumber("/sys/fs/cgroup/memory.current", &used)) {
    return available;
  }
  used -= std::min(used, ReclaimableCache());
  return std::min(available, limit > used ? limit - used : 0);
}

size_t AvailableSharedMemory() {
  size_t available = AvailableHostMemory();
  struct statvfs shm;
  if (statvfs("/dev/shm", &shm) == 0) {
    available = std::min(available, static_cast<size_t>(shm.f_bavail) * shm.f_frsize);
  }
  return available;
}

absl::StatusOr<Buffer> AllocateSharedMemory(size_t bytes) {
  static std::atomic<int> counter{0};
  const std::string name = fmt::format("/tandem-kv-{}-{}", getpid(), counter.fetch_add(1));
  const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) {
    return ResourceExhausted("the KV pool's shared memory cannot be created: {}", strerror(errno));
  }
  shm_unlink(name.c_str());
  Buffer descriptor(nullptr, 0, fd, [fd] { close(fd); });  // until the memory is mapped
  struct statvfs room;
  if (fstatvfs(fd, &room) == 0 && room.f_blocks > 0 &&
      static_cast<size_t>(room.f_bavail) * room.f_frsize < bytes) {
    return ResourceExhausted(
        "a KV pool of {} bytes does not fit into /dev/shm, which has {} left; lower "
        "--kv-cache-memory-bytes or enlarge /dev/shm",
        bytes, static_cast<size_t>(room.f_bavail) * room.f_frsize);
  }
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    return ResourceExhausted(
        "a KV pool of {} bytes cannot be had: {}; lower --kv-cache-memory-bytes", bytes,
        strerror(errno));
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return ResourceExhausted(
        "a KV pool of {} bytes cannot be mapped: {}; lower --kv-cache-memory-bytes", bytes,
        strerror(errno));
  }
  // The descriptor lives as long as the mapping.
  auto both = std::make_shared<Buffer>(std::move(descriptor));
  return Buffer(data, bytes, fd, [data, bytes, both] { munmap(data, bytes); });
}

}  // namespace tandem::engine
