#include "engine/device/cuda/cuda_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <memory>
#include <string>
#include <unistd.h>
#include <utility>

#include "common/base/status.h"

namespace tandem::engine::cuda {
namespace {

// The driver's functions, which no program links (cuda_library.h says why).
struct Driver {
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetAttribute) attribute = nullptr;
  decltype(&cuGetErrorString) error_string = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  bool complete = true;

  Driver() {
    Find("cuDeviceGet", &device_get);
    Find("cuDeviceGetAttribute", &attribute);
    Find("cuGetErrorString", &error_string);
    Find("cuMemGetAllocationGranularity", &granularity);
    Find("cuMemCreate", &create);
    Find("cuMemRelease", &release);
    Find("cuMemAddressReserve", &reserve);
    Find("cuMemAddressFree", &free);
    Find("cuMemMap", &map);
    Find("cuMemUnmap", &unmap);
    Find("cuMemSetAccess", &set_access);
    Find("cuMemExportToShareableHandle", &export_handle);
  }

  template <typename Function>
  void Find(const char* name, Function* function) {
    constexpr unsigned kVersion = 12000;  // of the functions' signatures
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) complete = false;
    *function = reinterpret_cast<Function>(found);
  }
};

const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

std::string ErrorText(CUresult error) {
  const char* text = nullptr;
  TheDriver().error_string(error, &text);
  return text != nullptr ? text : std::to_string(static_cast<int>(error));
}

bool CanExport(int ordinal) {
  const Driver& driver = TheDriver();
  CUdevice device;
  if (!driver.complete || driver.device_get(&device, ordinal) != CUDA_SUCCESS) return false;
  for (const CUdevice_attribute attribute :
       {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED}) {
    int supported = 0;
    if (driver.attribute(&supported, attribute, device) != CUDA_SUCCESS || supported == 0) {
      return false;
    }
  }
  return true;
}

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
  if (!CanExport(ordinal)) {
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
    return absl::UnimplementedError("cuMemGetAllocationGranularity: " + ErrorText(error));
  }
  auto allocation = std::make_shared<Allocation>();
  allocation->size = (bytes + granule - 1) / granule * granule;
  error = driver.create(&allocation->handle, allocation->size, &what, 0);
  if (error == CUDA_ERROR_OUT_OF_MEMORY) {
    return ResourceExhausted("{} bytes of the card's memory cannot be had", bytes);
  }
  // A container may forbid what the card can do.
  if (error != CUDA_SUCCESS) return absl::UnimplementedError("cuMemCreate: " + ErrorText(error));
  error = driver.reserve(&allocation->address, allocation->size, granule, 0, 0);
  if (error != CUDA_SUCCESS) return Internal("cuMemAddressReserve: {}", ErrorText(error));
  error = driver.map(allocation->address, allocation->size, 0, allocation->handle, 0);
  if (error != CUDA_SUCCESS) return Internal("cuMemMap: {}", ErrorText(error));
  allocation->mapped = true;
  CUmemAccessDesc access = {};
  access.location = what.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  error = driver.set_access(allocation->address, allocation->size, &access, 1);
  if (error != CUDA_SUCCESS) return Internal("cuMemSetAccess: {}", ErrorText(error));
  error = driver.export_handle(&allocation->fd, allocation->handle,
                               CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (error != CUDA_SUCCESS) {
    return absl::UnimplementedError("cuMemExportToShareableHandle: " + ErrorText(error));
  }
  void* data = reinterpret_cast<void*>(allocation->address);
  const int fd = allocation->fd;
  return Buffer(data, bytes, fd, [allocation] {});
}

}  // namespace tandem::engine::cuda
