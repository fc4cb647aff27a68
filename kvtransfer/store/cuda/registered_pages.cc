#include "kvtransfer/store/cuda/registered_pages.h"

#include <string>
#include <sys/resource.h>

#include "common/base/status.h"
#include "common/cuda/cuda_check.h"

namespace tandem::kvtransfer::cuda {
namespace {

std::string MemlockLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "not known";
  if (limit.rlim_cur == RLIM_INFINITY) return "unlimited";
  return fmt::format("{} bytes", limit.rlim_cur);
}

}  // namespace

absl::StatusOr<RegisteredPages> RegisteredPages::Register(std::span<std::byte> pages) {
  const cudaError_t error = cudaHostRegister(pages.data(), pages.size(),
                                             cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) {
    cudaGetLastError();  // not an error of whoever asks next
    return ResourceExhausted(
        "{} bytes of the host's memory cannot be pinned for the card: {}; the limit on locked "
        "memory is {} (raise it with `ulimit -l unlimited`, or `--ulimit memlock=-1` of a "
        "container; --kv-ring-bytes says how much each link takes)",
        pages.size(), cudaGetErrorString(error), MemlockLimit());
  }
  RegisteredPages registered;
  registered.pages_ = pages;
  void* device = nullptr;
  TANDEM_CUDA_CHECK(cudaHostGetDevicePointer(&device, pages.data(), 0));
  registered.device_ = static_cast<std::byte*>(device);
  return registered;
}

}  // namespace tandem::kvtransfer::cuda
