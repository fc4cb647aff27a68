// Errors of CUDA. There is no status to return in the middle of a step, and after most errors the
// context is lost anyway: so an error ends the process with an exit code of its own. The supervisor
// starts it again, the router re-routes.
//
// Engine and kvtransfer, which may not include each other, share it. All in this header, so that
// tests and benchmarks of single kernels need nothing else.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

namespace tandem::cuda {

inline constexpr int kCudaErrorExit = 75;

// The step that was given to a stream last, 0: none yet. Work is asynchronous: an error that comes
// up here may be of a step a little before it.
inline std::atomic<int64_t> current_step{0};

// Says what failed and ends the process; nothing is destroyed, for other threads still run.
[[noreturn]] inline void DieOfCudaError(const char* call, const char* error, const char* file,
                                        int line) {
  std::fprintf(stderr, "FATAL %s:%d: %s: %s (CUDA; step %lld)\n", file, line, call, error,
               static_cast<long long>(current_step.load()));
  std::fflush(stdout);
  std::fflush(stderr);
  std::_Exit(kCudaErrorExit);
}

inline void CheckCuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  DieOfCudaError(call, cudaGetErrorString(error), file, line);
}

}  // namespace tandem::cuda

// For calls of the runtime and for launchers.
#define TANDEM_CUDA_CHECK(call) ::tandem::cuda::CheckCuda((call), #call, __FILE__, __LINE__)
