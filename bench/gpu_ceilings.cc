#include "bench/gpu_ceilings.h"

#include <algorithm>
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <functional>
#include <vector>

#include "bench/gpu_ceilings_kernels.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/cuda/cuda_library.h"
#include "engine/device/cuda/cuda_check.h"

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
    TANDEM_ASSIGN_OR_RETURN(
        void* library,
        ::tandem::cuda::OpenCudaLibrary("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)));
    CublasLt lt;
    TANDEM_RETURN_IF_ERROR(::tandem::cuda::FindCudaFunction(library, "cublasLtCreate", &lt.Create));
    TANDEM_RETURN_IF_ERROR(
        ::tandem::cuda::FindCudaFunction(library, "cublasLtDestroy", &lt.Destroy));
    TANDEM_RETURN_IF_ERROR(
        ::tandem::cuda::FindCudaFunction(library, "cublasLtMatmulDescCreate", &lt.DescCreate));
    TANDEM_RETURN_IF_ERROR(::tandem::cuda::FindCudaFunction(
        library, "cublasLtMatmulDescSetAttribute", &lt.DescSetAttribute));
    TANDEM_RETURN_IF_ERROR(
        ::tandem::cuda::FindCudaFunction(library, "cublasLtMatmulDescDestroy", &lt.DescDestroy));
    TANDEM_RETURN_IF_ERROR(
        ::tandem::cuda::FindCudaFunction(library, "cublasLtMatrixLayoutCreate", &lt.LayoutCreate));
    TANDEM_RETURN_IF_ERROR(::tandem::cuda::FindCudaFunction(library, "cublasLtMatrixLayoutDestroy",
                                                            &lt.LayoutDestroy));
    TANDEM_RETURN_IF_ERROR(::tandem::cuda::FindCudaFunction(library, "cublasLtMatmul", &lt.Matmul));
    return lt;
  }
};

class LtMatmul final : public Matmul {
 public:
  static absl::StatusOr<std::unique_ptr<Matmul>> Create(int n) {
    TANDEM_ASSIGN_OR_RETURN(const CublasLt lt, CublasLt::Open());
    auto matmul = std::make_unique<LtMatmul>(lt, n);
    if (!matmul->Prepare()) return absl::InternalError("cuBLASLt refuses a plain product");
    return matmul;
  }

  LtMatmul(const CublasLt& lt, int n)
      : lt_(lt), n_(n), bytes_(2 * static_cast<size_t>(n) * static_cast<size_t>(n)) {}
  ~LtMatmul() override {
    if (square_ != nullptr) lt_.LayoutDestroy(square_);
    if (product_ != nullptr) lt_.DescDestroy(product_);
    if (handle_ != nullptr) lt_.Destroy(handle_);
  }

  Rates Measure() override {
    constexpr double kSustained = 0.5;
    const std::vector<float> seconds = Times(kSustained, [&] { Multiply(); });
    return {Flops() / Median({seconds.begin(), seconds.begin() + kRuns}),
            Flops() / Median(seconds)};
  }

  double RateFor(double seconds) override {
    // Asked for one behind the other, so that the card does not wait for the host.
    const int products = std::max(1, static_cast<int>(seconds * rate_ / Flops() + 0.5));
    cudaEvent_t begin, end;
    TANDEM_CUDA_CHECK(cudaEventCreate(&begin));
    TANDEM_CUDA_CHECK(cudaEventCreate(&end));
    TANDEM_CUDA_CHECK(cudaEventRecord(begin));
    for (int i = 0; i < products; ++i) Multiply();
    TANDEM_CUDA_CHECK(cudaEventRecord(end));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    TANDEM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    rate_ = products * Flops() / (static_cast<double>(ms) * 1e-3);
    return rate_;
  }

 private:
  bool Prepare() {
    FillRandom(a_.get(), bytes_, 1);
    FillRandom(b_.get(), bytes_, 2);
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const uint64_t side = static_cast<uint64_t>(n_);
    return lt_.Create(&handle_) == CUBLAS_STATUS_SUCCESS &&
           lt_.DescCreate(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           lt_.DescSetAttribute(product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                sizeof(transposed)) == CUBLAS_STATUS_SUCCESS &&
           lt_.LayoutCreate(&square_, CUDA_R_16BF, side, side, n_) == CUBLAS_STATUS_SUCCESS &&
           Run();
  }
  bool Run() {
    const float one = 1, zero = 0;
    return lt_.Matmul(handle_, product_, &one, a_.get(), square_, b_.get(), square_, &zero,
                      c_.get(), square_, c_.get(), square_, nullptr, workspace_.get(), kWorkspace,
                      nullptr) == CUBLAS_STATUS_SUCCESS;
  }
  void Multiply() { TANDEM_CHECK(Run(), "cuBLASLt multiplied once and refuses now"); }
  double Flops() const { return 2.0 * static_cast<double>(n_) * n_ * n_; }

  static constexpr size_t kWorkspace = size_t{64} << 20;

  const CublasLt lt_;
  const int n_;
  const size_t bytes_;  // of a matrix
  const DeviceArray a_{bytes_}, b_{bytes_}, c_{bytes_}, workspace_{kWorkspace};
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t square_ = nullptr;
  double rate_ = 7e14;  // of the last burst; at first a guess
};

}  // namespace

void FillRandom(void* data, size_t bytes, uint64_t seed) {
  int before = 0;
  cudaPointerAttributes place;
  TANDEM_CUDA_CHECK(cudaGetDevice(&before));
  TANDEM_CUDA_CHECK(cudaPointerGetAttributes(&place, data));
  TANDEM_CUDA_CHECK(cudaSetDevice(place.device));
  TANDEM_CUDA_CHECK(LaunchFillRandom(data, bytes, seed));
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  TANDEM_CUDA_CHECK(cudaSetDevice(before));
}

void FillRandomE4M3(void* data, size_t bytes, uint64_t seed) {
  TANDEM_CUDA_CHECK(LaunchFillRandomE4M3(data, bytes, seed));
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

absl::StatusOr<std::unique_ptr<Matmul>> Matmul::Create(int n) { return LtMatmul::Create(n); }

int CountGpus() {
  int count = 0;
  TANDEM_CUDA_CHECK(cudaGetDeviceCount(&count));
  return count;
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
