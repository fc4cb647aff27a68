#include "common/cuda/nccl_library.h"

#include "common/base/status.h"
#include "common/cuda/cuda_library.h"

namespace tandem::cuda {
namespace {

// The first whose communicators can be split.
constexpr int kMinimalVersion = NCCL_VERSION(2, 18, 0);

absl::StatusOr<Nccl> Find() {
  TANDEM_ASSIGN_OR_RETURN(void* const library, OpenCudaLibrary("libnccl.so.2"));
  Nccl nccl;
  decltype(&ncclGetVersion) get_version = nullptr;
  absl::Status status;
  const auto find = [&](const char* name, auto* function) {
    status.Update(FindCudaFunction(library, name, function));
  };
  find("ncclGetVersion", &get_version);
  find("ncclGetErrorString", &nccl.error_string);
  find("ncclGetUniqueId", &nccl.get_unique_id);
  find("ncclCommInitRankConfig", &nccl.init_rank);
  find("ncclCommSplit", &nccl.split);
  find("ncclCommGetAsyncError", &nccl.async_error);
  find("ncclCommAbort", &nccl.abort);
  find("ncclSend", &nccl.send);
  find("ncclRecv", &nccl.receive);
  TANDEM_RETURN_IF_ERROR(status);
  if (get_version(&nccl.version) != ncclSuccess || nccl.version < kMinimalVersion) {
    return FailedPrecondition("libnccl.so.2 is of version {}, and {} is needed at least",
                              nccl.version, kMinimalVersion);
  }
  return nccl;
}

}  // namespace

absl::StatusOr<const Nccl*> FindNccl() {
  static const auto* found = new absl::StatusOr<Nccl>(Find());
  if (!found->ok()) return found->status();
  return &**found;
}

}  // namespace tandem::cuda
