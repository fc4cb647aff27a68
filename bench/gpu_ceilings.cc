#include "bench/gpu_ceilings.h"

#include <algorithm>
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <functional>
#include <vector>

#include "bench/gpu_ceilings_kernels.h"
#include "common/base/status.h"
#include "engine/device/cuda/cuda_check.h"
#include "engine/device/cuda/cuda_library.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kRuns = 9;

class DeviceArray {
 public:
  explicit DeviceArray(size_t bytes) { TANDEM_CUDA_CHECK(cudaMalloc(&data_, bytes)); }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

double Median(std::vector<float> values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return static_cast<double>(*middle);
}

// Of each run of `work`, in seconds: at least kRuns of them, and as many as take `at_least`
// seconds.
std::vector<float> Times(double at_least, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  TANDEM_CUDA_CHECK(cudaEventCreate(&begin));
  TANDEM_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> seconds;
  double total = 0;
  for (int i = -2; i < kRuns || total < at_least; ++i) {
    TANDEM_CUDA_CHECK(cudaEventRecord(begin));
    work();
    TANDEM_CUDA_CHECK(cudaEventRecord(end));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    TANDEM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i < 0) continue;  // warms up
    seconds.push_back(ms * 1e-3f);
    total += seconds.back();
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return seconds;
}

// The few functions of cuBLASLt that one product takes.
struct CublasLt {
  decltype(&cublasLtCreate) Create;
  decltype(&cublasLtDestroy) Destroy;
  decltype(&cublasLtMatmulDescCreate) DescCreate;
  decltype(&cublasLtMatmulDescSetAttribute) DescSetAttribute;
  decltype(&cublasLtMatmulDescDestroy) DescDestroy;
  decltype(&cublasLtMatrixLayoutCreate) LayoutCreate;
  decltype(&cublasLtMatrixLayoutDestroy) LayoutDestroy;
  decltype(&cublasLtMatmul) Matmul;

  static absl::StatusOr<CublasLt> Open() {
    TANDEM_ASSIGN_OR_RETURN(void* library,
                            OpenCudaLibrary("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)));
    CublasLt lt;
    TANDEM_RETURN_IF_ERROR(FindCudaFunction(library, "cublasLtCreate", &lt.Create));
    TANDEM_RETURN_IF_ERROR(FindCudaFunction(library, "cublasLtDestroy", &lt.Destroy));
    TANDEM_RETURN_IF_ERROR(FindCudaFunction(library, "cublasLtMatmulDescCreate", &lt.DescCreate));
    TANDEM_RETURN_IF_ERROR(
        FindCudaFunction(library, "cublasLtMatmulDescSetAttribute", &lt.DescSetAttribute));
    TANDEM_RETURN_IF_ERROR(FindCudaFunction(library, "cublasLtMatmulDescDestroy", &lt.DescDestroy));
    TANDEM_RETURN_IF_ERROR(
        FindCudaFunction(library, "cublasLtMatrixLayoutCreate", &lt.LayoutCreate));
    TANDEM_RETURN_IF_ERROR(
        FindCudaFunction(library, "cublasLtMatrixLayoutDestroy", &lt.LayoutDestroy));
    TANDEM_RETURN_IF_ERROR(FindCudaFunction(library, "cublasLtMatmul", &lt.Matmul));
    return lt;
  }
};

}  // namespace

void FillRandom(void* data, size_t bytes, uint64_t seed) {
  TANDEM_CUDA_CHECK(LaunchFillRandom(data, bytes, seed));
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
}

absl::StatusOr<double> ReadBandwidth() {
  constexpr size_t kBytes = size_t{8} << 30;
  const DeviceArray data(kBytes), sum(sizeof(uint32_t));
  FillRandom(data.get(), kBytes, 1);
  int multiprocessors = 0;
  TANDEM_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const std::vector<float> seconds = Times(0, [&] {
    TANDEM_CUDA_CHECK(
        LaunchRead(data.get(), kBytes, multiprocessors * 4, static_cast<uint32_t*>(sum.get())));
  });
  return static_cast<double>(kBytes) / Median(seconds);
}

absl::StatusOr<MatmulRates> MatmulRate(int n) {
  TANDEM_ASSIGN_OR_RETURN(const CublasLt lt, CublasLt::Open());
  constexpr size_t kWorkspace = size_t{64} << 20;
  const size_t bytes = 2 * static_cast<size_t>(n) * static_cast<size_t>(n);
  const DeviceArray a(bytes), b(bytes), c(bytes), workspace(kWorkspace);
  FillRandom(a.get(), bytes, 1);
  FillRandom(b.get(), bytes, 2);
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t square;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const uint64_t side = static_cast<uint64_t>(n);
  if (lt.Create(&handle) != CUBLAS_STATUS_SUCCESS ||
      lt.DescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS ||
      lt.DescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)) !=
          CUBLAS_STATUS_SUCCESS ||
      lt.LayoutCreate(&square, CUDA_R_16BF, side, side, n) != CUBLAS_STATUS_SUCCESS) {
    return absl::InternalError("cuBLASLt refuses a plain product");
  }
  const float one = 1, zero = 0;
  bool ok = true;
  constexpr double kSustained = 0.5;
  const std::vector<float> seconds = Times(kSustained, [&] {
    ok &= lt.Matmul(handle, product, &one, a.get(), square, b.get(), square, &zero, c.get(), square,
                    c.get(), square, nullptr, workspace.get(), kWorkspace,
                    nullptr) == CUBLAS_STATUS_SUCCESS;
  });
  lt.LayoutDestroy(square);
  lt.DescDestroy(product);
  lt.Destroy(handle);
  if (!ok) return absl::InternalError("cuBLASLt cannot multiply large matrices");
  const double flops = 2.0 * static_cast<double>(n) * n * n;
  return MatmulRates{flops / Median({seconds.begin(), seconds.begin() + kRuns}),
                     flops / Median(seconds)};
}

std::string DescribeGpu() {
  cudaDeviceProp properties;
  int driver = 0;
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  TANDEM_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return std::string(properties.name) + ", driver for CUDA " + std::to_string(driver / 1000) + "." +
         std::to_string(driver % 1000 / 10);
}

}  // namespace tandem::engine::cuda
