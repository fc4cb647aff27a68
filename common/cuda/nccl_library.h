// NCCL's functions, found when they are needed (cuda_library.h says why and where).
#pragma once

#include <nccl.h>

#include "absl/status/statusor.h"

namespace tandem::cuda {

struct Nccl {
  decltype(&ncclGetErrorString) error_string = nullptr;
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRankConfig) init_rank = nullptr;
  decltype(&ncclCommSplit) split = nullptr;
  decltype(&ncclCommGetAsyncError) async_error = nullptr;
  decltype(&ncclCommAbort) abort = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) receive = nullptr;
  int version = 0;  // as ncclGetVersion() has it: 22809
};

// The same for the whole process. NOT_FOUND names where libnccl was looked for, FAILED_PRECONDITION
// a version that is too old.
absl::StatusOr<const Nccl*> FindNccl();

}  // namespace tandem::cuda
