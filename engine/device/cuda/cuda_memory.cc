#include "engine/device/cuda/cuda_memory.h"

#include <cuda.h>
#include <memory>
#include <unistd.h>
#include <utility>

#include "common/base/status.h"
#include "common/cuda/cuda_driver.h"

namespace tandem::engine::cuda {
namespace {

using ::tandem::cuda::Driver;
using ::tandem::cuda::DriverErrorText;
using ::tandem::cuda::TheDriver;

// What has been got so far; given back in reverse.
struct Allocation {
  size_t size = 0;  // whole granules
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr address = 0;
  bool mapped = false;
  int fd = -1;

  ~Allocation() {
    const Driver& driver = TheDriver();
    if (fd >= 0) close(fd);
    if (mapped) driver.unmap(address, size);
    if (address != 0) driver.free(address, size);
    if (handle != 0) driver.release(handle);
  }
};

}  // namespace

absl::StatusOr<Buffer> AllocateExportable(int ordinal, size_t bytes) {
  if (!::tandem::cuda::SharesMemory(ordinal)) {
    return absl::UnimplementedError("the card cannot share its memory with other processes");
  }
  const Driver& driver = TheDriver();
  CUmemAllocationProp what = {};
  what.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  what.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  what.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  what.location.id = ordinal;
  size_t granule = 0;
  CUresult error = driver.granularity(&granule, &what, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (error != CUDA_SUCCESS || granule == 0) {
    return absl::UnimplementedError("cuMemGetAllocationGranularity: " + DriverErrorText(error));
  }
  auto allocation = std::make_shared<Allocation>();
  allocation->size = (bytes + granule - 1) / granule * granule;
  error = driver.create(&allocation->handle, allocation->size, &what, 0);
  if (error == CUDA_ERROR_OUT_OF_MEMORY) {
    return ResourceExhausted("{} bytes of the card's memory cannot be had", bytes);
  }
  // A container may forbid what the card can do.
  if (error != CUDA_SUCCESS)
    return absl::UnimplementedError("cuMemCreate: " + DriverErrorText(error));
  error = driver.reserve(&allocation->address, allocation->size, granule, 0, 0);
  if (error != CUDA_SUCCESS) return Internal("cuMemAddressReserve: {}", DriverErrorText(error));
  error = driver.map(allocation->address, allocation->size, 0, allocation->handle, 0);
  if (error != CUDA_SUCCESS) return Internal("cuMemMap: {}", DriverErrorText(error));
  allocation->mapped = true;
  CUmemAccessDesc access = {};
  access.location = what.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  error = driver.set_access(allocation->address, allocation->size, &access, 1);
  if (error != CUDA_SUCCESS) return Internal("cuMemSetAccess: {}", DriverErrorText(error));
  error = driver.export_handle(&allocation->fd, allocation->handle,
                               CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (error != CUDA_SUCCESS) {
    return absl::UnimplementedError("cuMemExportToShareableHandle: " + DriverErrorText(error));
  }
  void* data = reinterpret_cast<void*>(allocation->address);
  const int fd = allocation->fd;
  return Buffer(data, bytes, fd, [allocation] {});
}

}  // namespace tandem::engine::cuda
