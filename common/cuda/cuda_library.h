// Libraries of CUDA that are found when they are needed. Programs link neither cuBLAS nor NCCL
// (hundreds of megabytes that most machines with a GPU have somewhere), nor the driver's libcuda:
// its functions come by cudaGetDriverEntryPointByVersion. So the same program starts on a machine
// without any of them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cuda {

// Where OpenCudaLibrary looks besides the system's own places, in this order: beside the program
// (../lib, its own folder), CUDA's toolkit, and every nvidia/*/lib of a Python site-packages
// (VIRTUAL_ENV, CONDA_PREFIX, PYTHONPATH, the user's and the system's). Folders that exist.
std::vector<std::string> CudaLibraryFolders();

// A handle of dlopen, open for the life of the process: "libcublasLt.so.13". Beside the program
// first, then LD_LIBRARY_PATH and the system, then the other folders. NOT_FOUND names where it was
// looked for.
absl::StatusOr<void*> OpenCudaLibrary(const std::string& file_name);

// A function of such a library. NOT_FOUND where it has none of that name.
template <typename Function>
absl::Status FindCudaFunction(void* library, const char* name, Function** function);

// What the template calls.
absl::StatusOr<void*> FindCudaSymbol(void* library, const char* name);

template <typename Function>
absl::Status FindCudaFunction(void* library, const char* name, Function** function) {
  const absl::StatusOr<void*> found = FindCudaSymbol(library, name);
  if (found.ok()) *function = reinterpret_cast<Function*>(*found);
  return found.status();
}

}  // namespace tandem::cuda
