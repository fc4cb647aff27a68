// The driver's functions for memory that processes hand to each other (virtual memory management).
// No program links libcuda, so that all start on a machine without it: they are found at run time.
//
// Engine and kvtransfer, which may not include each other, share it, as cuda_check.h.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <string>

namespace tandem::cuda {

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
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuMemGetAllocationPropertiesFromHandle) properties = nullptr;
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
    Find("cuMemImportFromShareableHandle", &import_handle);
    Find("cuMemGetAllocationPropertiesFromHandle", &properties);
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

inline const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

inline std::string DriverErrorText(CUresult error) {
  const char* text = nullptr;
  TheDriver().error_string(error, &text);
  return text != nullptr ? text : std::to_string(static_cast<int>(error));
}

// Whether the card `ordinal` can share memory by descriptors.
inline bool SharesMemory(int ordinal) {
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

}  // namespace tandem::cuda
