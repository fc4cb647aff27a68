// What one GPU can do at the moment: the ceilings that every figure of engine_bench on a GPU is a
// ratio to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace tandem::engine::cuda {

// Bytes per second of reading 8 GB of random data once with wide loads: the median of nine runs.
absl::StatusOr<double> ReadBandwidth();
// n x n x n bfloat16 products with float32 sums by cuBLASLt's first choice, on random data.
class Matmul {
 public:
  // NOT_FOUND without cuBLASLt.
  static absl::StatusOr<std::unique_ptr<Matmul>> Create(int n);
  virtual ~Matmul() = default;

  // FLOP per second.
  struct Rates {
    double burst = 0;  // the median of the first nine products, while the card is cool
    // The median over half a second without a pause: a card at work draws more power than it may
    // for long and lowers its clock, as it does in a long prefill.
    double sustained = 0;
  };
  virtual Rates Measure() = 0;
  // Of products without a pause for about so long, first to last, in the state that the card is in:
  // the ceiling of work that took as long right before.
  virtual double RateFor(double seconds) = 0;
};
// Random bfloat16 numbers in [-1, 1).
void FillRandom(void* data, size_t bytes, uint64_t seed);
// Random e4m3 numbers in (-2, 2).
void FillRandomE4M3(void* data, size_t bytes, uint64_t seed);
int CountGpus();
// "NVIDIA H200, driver CUDA 13.0".
std::string DescribeGpu();

}  // namespace tandem::engine::cuda
