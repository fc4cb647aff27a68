#include "engine/kernels/cuda/cublas_linear.h"

#include <algorithm>
#include <cublasLt.h>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "common/cuda/cuda_library.h"
#include "engine/kernels/cuda/plain_linear.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kCandidates = 8;
constexpr int kTimingsOfEach = 3;
// An algorithm must be faster than an earlier one, which the heuristics prefer, by more than
// timings err: processes on cards of one kind should choose alike.
constexpr float kClearlyFaster = 0.95f;
constexpr size_t kWorkspaceAlignment = 256;  // bytes

// The functions of the library that are used here.
struct Cublas {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) check = nullptr;
};

absl::StatusOr<Cublas> OpenCublas() {
  absl::StatusOr<void*> library = ::tandem::cuda::OpenCudaLibrary("libcublasLt.so.13");
  if (!library.ok()) return library.status();
  Cublas c;
  absl::Status status;
  const auto find = [&](const char* name, auto* function) {
    status.Update(::tandem::cuda::FindCudaFunction(*library, name, function));
  };
  find("cublasLtCreate", &c.create);
  find("cublasLtDestroy", &c.destroy);
  find("cublasLtMatmul", &c.matmul);
  find("cublasLtMatmulDescCreate", &c.desc_create);
  find("cublasLtMatmulDescDestroy", &c.desc_destroy);
  find("cublasLtMatmulDescSetAttribute", &c.desc_set);
  find("cublasLtMatrixLayoutCreate", &c.layout_create);
  find("cublasLtMatrixLayoutDestroy", &c.layout_destroy);
  find("cublasLtMatmulPreferenceCreate", &c.preference_create);
  find("cublasLtMatmulPreferenceDestroy", &c.preference_destroy);
  find("cublasLtMatmulPreferenceSetAttribute", &c.preference_set);
  find("cublasLtMatmulAlgoGetHeuristic", &c.heuristic);
  find("cublasLtMatmulAlgoCheck", &c.check);
  if (!status.ok()) return status;
  return c;
}

size_t RoundUp(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

int BucketOf(int rows) {
  int bucket = 1;
  while (bucket < rows) bucket *= 2;
  return bucket;
}

size_t OutputBytes(const ProductShape& shape) {
  return shape.output == ProductOutput::kBFloat16 ? 2 : 4;
}

// A product as the library describes it. In its column-major view the row-major y is [n] x [rows],
// the weight, [k] x [n], is transposed, and x is [k] x [rows].
class Problem {
 public:
  Problem(const Cublas& c, const ProductShape& shape, int rows) : c_(c) {
    const uint64_t n = static_cast<uint64_t>(shape.n), k = static_cast<uint64_t>(shape.k);
    const uint64_t m = static_cast<uint64_t>(rows);
    const cudaDataType_t out = shape.output == ProductOutput::kBFloat16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    good_ = c_.desc_create(&desc_, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
            c_.desc_set(desc_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)) ==
                CUBLAS_STATUS_SUCCESS &&
            c_.layout_create(&weight_, CUDA_R_16BF, k, n, shape.k) == CUBLAS_STATUS_SUCCESS &&
            c_.layout_create(&x_, CUDA_R_16BF, k, m, shape.k) == CUBLAS_STATUS_SUCCESS &&
            c_.layout_create(&y_, out, n, m, shape.n) == CUBLAS_STATUS_SUCCESS;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() {
    if (desc_ != nullptr) c_.desc_destroy(desc_);
    if (weight_ != nullptr) c_.layout_destroy(weight_);
    if (x_ != nullptr) c_.layout_destroy(x_);
    if (y_ != nullptr) c_.layout_destroy(y_);
  }

  // The best that the heuristics know, best first.
  std::vector<cublasLtMatmulAlgo_t> Candidates(cublasLtHandle_t handle, bool uncut, int count) {
    std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(count));
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    cublasLtMatmulPreference_t preference = nullptr;
    if (!good_ || c_.preference_create(&preference) != CUBLAS_STATUS_SUCCESS) return algorithms;
    const size_t workspace = CublasLinear::kWorkspaceBytes;
    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    c_.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                      sizeof(workspace));
    if (uncut) {
      c_.preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none,
                        sizeof(none));
    }
    int found = 0;
    const cublasStatus_t status =
        c_.heuristic(handle, desc_, weight_, x_, y_, y_, preference, count, results.data(), &found);
    c_.preference_destroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS) return algorithms;
    for (int i = 0; i < found; ++i) {
      const cublasLtMatmulHeuristicResult_t& result = results[static_cast<size_t>(i)];
      if (result.state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(result.algo);
    }
    return algorithms;
  }

  bool Takes(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algorithm) const {
    cublasLtMatmulHeuristicResult_t result = {};
    return good_ &&
           c_.check(handle, desc_, weight_, x_, y_, y_, &algorithm, &result) ==
               CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= CublasLinear::kWorkspaceBytes;
  }

  cublasStatus_t Run(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algorithm, bool add,
                     const void* x, const void* weight, void* y, void* workspace,
                     cudaStream_t stream) const {
    const float one = 1, zero = 0;
    return c_.matmul(handle, desc_, &one, weight, weight_, x, x_, add ? &one : &zero, y, y_, y, y_,
                     &algorithm, workspace, CublasLinear::kWorkspaceBytes, stream);
  }

 private:
  const Cublas& c_;
  cublasLtMatmulDesc_t desc_ = nullptr;
  cublasLtMatrixLayout_t weight_ = nullptr, x_ = nullptr, y_ = nullptr;
  bool good_ = false;
};

class Linear final : public CublasLinear {
 public:
  Linear(const Cublas& c, cublasLtHandle_t handle, void* workspace, bool fixed)
      : c_(c), handle_(handle), workspace_(workspace), fixed_(fixed) {}
  ~Linear() override { c_.destroy(handle_); }

  absl::Status Prepare(const ProductShape& shape, int max_rows, void* scratch,
                       cudaStream_t stream) override;
  cudaError_t Run(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                  const __nv_bfloat16* weight, void* y, cudaStream_t stream) override;

 private:
  struct Choice {
    std::unique_ptr<Problem> problem;
    cublasLtMatmulAlgo_t algorithm = {};
    bool plain = false;  // the library has nothing for it
  };
  using Key = std::tuple<int, int, ProductOutput, int>;  // n, k, output, rows
  static Key KeyOf(const ProductShape& s, int rows) { return {s.n, s.k, s.output, rows}; }

  // Milliseconds of the fastest of a few runs; < 0: it does not run.
  float Time(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm, bool add, const void* x,
             const void* weight, void* y, float give_up, cudaStream_t stream);
  bool TakesAll(const ProductShape& shape, int largest,
                const cublasLtMatmulAlgo_t& algorithm) const;
  const Choice& ChoiceFor(const ProductShape& shape, int rows);

  const Cublas c_;
  const cublasLtHandle_t handle_;
  void* const workspace_;
  const bool fixed_;
  std::map<Key, cublasLtMatmulAlgo_t> timed_;  // by bucket
  std::map<Key, Choice> choices_;              // by number of rows
};

float Linear::Time(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm, bool add,
                   const void* x, const void* weight, void* y, float give_up, cudaStream_t stream) {
  cudaEvent_t begin = nullptr, end = nullptr;
  float best = -1;
  if (cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess) {
    for (int i = 0; i < kTimingsOfEach; ++i) {
      cudaEventRecord(begin, stream);
      if (problem.Run(handle_, algorithm, add, x, weight, y, workspace_, stream) !=
          CUBLAS_STATUS_SUCCESS) {
        best = -1;
        break;
      }
      cudaEventRecord(end, stream);
      float time = 0;
      if (cudaEventSynchronize(end) != cudaSuccess ||
          cudaEventElapsedTime(&time, begin, end) != cudaSuccess) {
        best = -1;
        break;
      }
      // The first run loads the kernel.
      if (i > 0 && (best < 0 || time < best)) best = time;
      if (i > 0 && give_up > 0 && best > 2 * give_up) break;
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

bool Linear::TakesAll(const ProductShape& shape, int largest,
                      const cublasLtMatmulAlgo_t& algorithm) const {
  for (int rows = 1; rows <= largest; rows *= 2) {
    if (!Problem(c_, shape, rows).Takes(handle_, algorithm)) return false;
  }
  return true;
}

absl::Status Linear::Prepare(const ProductShape& shape, int max_rows, void* scratch,
                             cudaStream_t stream) {
  const int largest = BucketOf(max_rows);
  const size_t n = static_cast<size_t>(shape.n), k = static_cast<size_t>(shape.k);
  const size_t rows = static_cast<size_t>(largest);
  auto* weight = static_cast<__nv_bfloat16*>(scratch);
  auto* x = weight + RoundUp(n * k * 2) / 2;
  void* y = x + RoundUp(rows * k * 2) / 2;
  // Random numbers: on zeros a GPU runs faster than it ever does in earnest.
  for (const cudaError_t error :
       {FillNoise(weight, n * k, 1, stream), FillNoise(x, rows * k, 2, stream),
        cudaMemsetAsync(y, 0, rows * n * OutputBytes(shape), stream)}) {
    if (error != cudaSuccess) return absl::InternalError(cudaGetErrorString(error));
  }
  for (int bucket = fixed_ ? largest : 1; bucket <= largest; bucket *= 2) {
    if (timed_.contains(KeyOf(shape, bucket))) continue;
    Problem problem(c_, shape, bucket);
    float best = -1;
    for (const auto& algorithm : problem.Candidates(handle_, fixed_, kCandidates)) {
      if (fixed_ && !TakesAll(shape, largest, algorithm)) continue;
      const float time = Time(problem, algorithm, shape.output == ProductOutput::kAddFloat32, x,
                              weight, y, best, stream);
      if (time < 0 || (best >= 0 && time >= kClearlyFaster * best)) continue;
      best = time;
      timed_[KeyOf(shape, bucket)] = algorithm;
      // The first that runs: timings differ from process to process, and algorithms that do not cut
      // K may still add in other orders.
      if (fixed_) break;
    }
  }
  if (fixed_) {
    const auto found = timed_.find(KeyOf(shape, largest));
    for (int bucket = 1; found != timed_.end() && bucket < largest; bucket *= 2) {
      timed_[KeyOf(shape, bucket)] = found->second;
    }
  }
  const cudaError_t error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("timing of cuBLAS: ", cudaGetErrorString(error)));
}

const Linear::Choice& Linear::ChoiceFor(const ProductShape& shape, int rows) {
  const auto [at, is_new] = choices_.try_emplace(KeyOf(shape, rows));
  Choice& choice = at->second;
  if (!is_new) return choice;
  choice.problem = std::make_unique<Problem>(c_, shape, rows);
  const auto timed = timed_.find(KeyOf(shape, BucketOf(rows)));
  if (timed != timed_.end() && choice.problem->Takes(handle_, timed->second)) {
    choice.algorithm = timed->second;
    return choice;
  }
  choice.plain = fixed_;
  if (fixed_) return choice;
  const auto candidates = choice.problem->Candidates(handle_, fixed_, 1);
  choice.plain = candidates.empty();
  if (!choice.plain) choice.algorithm = candidates.front();
  return choice;
}

cudaError_t Linear::Run(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                        const __nv_bfloat16* weight, void* y, cudaStream_t stream) {
  const Choice& choice = ChoiceFor(shape, rows);
  if (choice.plain) return PlainLinear(shape, rows, x, weight, y, stream);
  const cublasStatus_t status =
      choice.problem->Run(handle_, choice.algorithm, shape.output == ProductOutput::kAddFloat32, x,
                          weight, y, workspace_, stream);
  if (status == CUBLAS_STATUS_SUCCESS) return cudaSuccess;
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : cudaErrorUnknown;
}

}  // namespace

size_t CublasLinear::PrepareBytes(const ProductShape& shape, int max_rows) {
  const size_t n = static_cast<size_t>(shape.n), k = static_cast<size_t>(shape.k);
  const size_t rows = static_cast<size_t>(BucketOf(max_rows));
  return RoundUp(n * k * 2) + RoundUp(rows * k * 2) + RoundUp(rows * n * OutputBytes(shape));
}

absl::StatusOr<std::unique_ptr<CublasLinear>> CublasLinear::Create(void* workspace, bool fixed) {
  absl::StatusOr<Cublas> cublas = OpenCublas();
  if (!cublas.ok()) return cublas.status();
  cublasLtHandle_t handle = nullptr;
  const cublasStatus_t status = cublas->create(&handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return absl::InternalError(absl::StrCat("cublasLtCreate: status ", static_cast<int>(status)));
  }
  return std::make_unique<Linear>(*cublas, handle, workspace, fixed);
}

}  // namespace tandem::engine::cuda
