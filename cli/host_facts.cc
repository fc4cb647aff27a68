#include "cli/host_facts.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstddef>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <thread>
#include <unistd.h>

#include "absl/strings/ascii.h"
#include "fmt/format.h"

#include "common/base/build_info.h"
#include "common/base/fd.h"
#include "common/base/host_memory.h"

namespace tandem::cli {
namespace {

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (line.starts_with("model name") && colon != std::string::npos) {
      return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
    }
  }
  return "unknown";
}

int Cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

int CountNumaNodes() {
  int count = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename().string();
    if (name.size() > 4 && name.starts_with("node") && absl::ascii_isdigit(name[4])) ++count;
  }
  return count;
}

uint64_t Limit(__rlimit_resource resource) {
  rlimit limit = {};
  if (getrlimit(resource, &limit) != 0) return 0;
  return limit.rlim_cur == RLIM_INFINITY ? std::numeric_limits<uint64_t>::max() : limit.rlim_cur;
}

// As a worker does it with its peer: see HostFacts::sharing_error.
std::string SharingError() {
  const Fd self(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  if (!self.valid()) {
    return fmt::format("processes cannot be watched (pidfd_open: {})", std::strerror(errno));
  }
  const Fd listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const std::string name = fmt::format("tandem-doctor-{}", getpid());
  name.copy(address.sun_path + 1, sizeof(address.sun_path) - 1);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (!listener.valid() ||
      bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    return fmt::format("Unix sockets of the abstract namespace cannot be had ({})",
                       std::strerror(errno));
  }
  return "";
}

// What is asked of the driver, whose header is not there in every build. Opened by name, as the
// programs do that compute on GPUs: no program links it.
class CudaDriver {
 public:
  CudaDriver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {}
  CudaDriver(const CudaDriver&) = delete;

  std::string Read(HostFacts* facts) const {
    if (library_ == nullptr) return "libcuda.so.1 is not there";
    const auto init = Find<int(unsigned)>("cuInit");
    const auto version = Find<int(int*)>("cuDriverGetVersion");
    const auto count = Find<int(int*)>("cuDeviceGetCount");
    if (init == nullptr || version == nullptr || count == nullptr)
      return "libcuda.so.1 is not CUDA's";
    if (const int error = init(0); error != 0) {
      return error == kNoDevice ? "it knows of no GPU"
                                : fmt::format("cuInit fails: error {}", error);
    }
    int number = 0;
    int gpus = 0;
    if (version(&number) != 0 || count(&gpus) != 0) return "it does not answer";
    for (int i = 0; i < gpus; ++i) facts->gpus.push_back(ReadGpu(i, gpus));
    facts->driver = fmt::format("{}.{}", number / 1000, number % 1000 / 10);
    return "";
  }

 private:
  static constexpr int kNoDevice = 100;
  static constexpr int kManagesVirtualMemory = 102;  // CU_DEVICE_ATTRIBUTE_...
  static constexpr int kExportsDescriptors = 103;

  template <typename Function>
  Function* Find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }

  GpuFacts ReadGpu(int ordinal, int gpus) const {
    const auto get = Find<int(int*, int)>("cuDeviceGet");
    const auto name = Find<int(char*, int, int)>("cuDeviceGetName");
    const auto memory = Find<int(size_t*, int)>("cuDeviceTotalMem_v2");
    const auto bus = Find<int(char*, int, int)>("cuDeviceGetPCIBusId");
    const auto attribute = Find<int(int*, int, int)>("cuDeviceGetAttribute");
    const auto reaches = Find<int(int*, int, int)>("cuDeviceCanAccessPeer");
    GpuFacts facts;
    int device = 0;
    if (get == nullptr || get(&device, ordinal) != 0) return facts;
    std::array<char, 128> text = {};
    if (name != nullptr && name(text.data(), text.size(), device) == 0) facts.name = text.data();
    size_t bytes = 0;
    if (memory != nullptr && memory(&bytes, device) == 0) facts.memory_bytes = bytes;
    if (bus != nullptr && bus(text.data(), text.size(), device) == 0) {
      facts.bus = absl::AsciiStrToLower(text.data());
      std::ifstream file("/sys/bus/pci/devices/" + facts.bus + "/numa_node");
      if (!(file >> facts.node)) facts.node = -1;
    }
    for (const int wanted : {kManagesVirtualMemory, kExportsDescriptors}) {
      int supported = 0;
      if (attribute == nullptr || attribute(&supported, wanted, device) != 0 || supported == 0) {
        facts.exports_memory = false;
      }
    }
    for (int other = 0; other < gpus; ++other) {
      int peer = 0;
      int can = 0;
      facts.reaches.push_back(other == ordinal || (reaches != nullptr && get(&peer, other) == 0 &&
                                                   reaches(&can, device, peer) == 0 && can != 0));
    }
    return facts;
  }

  void* const library_;  // until the process ends: a driver does not like to be unloaded
};

}  // namespace

HostFacts ReadHostFacts() {
  HostFacts facts;
  facts.cpu = CpuName();
  facts.cores = Cores();
  const HostMemory memory = ReadHostMemory();
  facts.memory_bytes = memory.total;
  facts.memory_available = memory.available;
  facts.numa_nodes = CountNumaNodes();
  struct statvfs shm = {};
  if (statvfs("/dev/shm", &shm) == 0) {
    facts.shm_bytes = uint64_t{shm.f_blocks} * shm.f_frsize;
    facts.shm_free = uint64_t{shm.f_bavail} * shm.f_frsize;
  }
  facts.locked_bytes = Limit(RLIMIT_MEMLOCK);
  facts.open_files = Limit(RLIMIT_NOFILE);
  facts.sharing_error = SharingError();
  facts.cuda_built = GetBuildInfo().cuda;
  facts.driver_error = CudaDriver().Read(&facts);
  return facts;
}

}  // namespace tandem::cli
