// The numbers of a draw. A token's weight is its probability relative to the most likely one's, as
// an integer, so that sums of weights do not depend on their order: every device that has the same
// logits keeps the same tokens and draws the same one.
//
// Only single operations of IEEE arithmetic are used, each rounded for itself: files that include
// this are compiled without contraction of products and sums (-ffp-contract=off).
#pragma once

#include <bit>
#include <cstdint>

#include "engine/kernels/host_device.h"

namespace tandem::engine {

inline constexpr int kWeightBits = 44;  // 2^19 tokens of full weight do not overflow a sum
inline constexpr uint64_t kFullWeight = uint64_t{1} << kWeightBits;

TANDEM_HOST_DEVICE inline float RoundedProduct(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TANDEM_HOST_DEVICE inline float RoundedSum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

TANDEM_HOST_DEVICE inline uint32_t BitsOf(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

// From differences of logits to powers of two.
TANDEM_HOST_DEVICE inline float DrawScale(float temperature) { return 1.44269504f / temperature; }

// 2^44 exp((logit - maximum) / temperature), rounded down, for logit <= maximum; kFullWeight at the
// maximum. Never larger for a smaller logit. Relative error at most 2e-7 + 1e-7 |(logit - maximum)
// / temperature|, which is that of the float32 exponent.
TANDEM_HOST_DEVICE inline uint64_t DrawWeight(float logit, float maximum, float scale) {
  const float exponent = RoundedProduct(RoundedSum(logit, -maximum), scale);
  if (!(exponent > -kWeightBits - 1)) return 0;
  // Rounded down: to the nearest integer of half below, as the last bits of a large number. Where
  // the exponent is an integer the one below does as well.
  const float shifter = 0x1.8p23f;
  const float shifted = RoundedSum(RoundedSum(exponent, -0.5f), shifter);
  const int whole = static_cast<int>(BitsOf(shifted) - BitsOf(shifter));
  const float f = RoundedSum(exponent, -RoundedSum(shifted, -shifter));
  // 2^f on [0, 1] by a polynomial of least relative error (2.2e-9) among those that are right at
  // both ends. Its coefficients are positive, so that rounding keeps it monotone.
  float power = RoundedProduct(0.00021715018374379724f, f);
  power = RoundedProduct(RoundedSum(power, 0.0012440878199413419f), f);
  power = RoundedProduct(RoundedSum(power, 0.009678063914179802f), f);
  power = RoundedProduct(RoundedSum(power, 0.05548415333032608f), f);
  power = RoundedProduct(RoundedSum(power, 0.2402295172214508f), f);
  power = RoundedProduct(RoundedSum(power, 0.6931470036506653f), f);
  power = RoundedSum(power, 1.0f);
  // 2^23 power, by its bits: right from 1 to 2, both included.
  const uint64_t mantissa = BitsOf(power) - 0x3f000000u;
  return mantissa << (kWeightBits - 23) >> -whole;
}

// The least weight that is not below `min_p`.
TANDEM_HOST_DEVICE inline uint64_t LeastWeight(float min_p) {
  const double exact = static_cast<double>(min_p) * static_cast<double>(kFullWeight);
  const uint64_t below = static_cast<uint64_t>(exact);
  return static_cast<double>(below) < exact ? below + 1 : below;
}

// The part `fraction` in [0, 1] of a sum of weights.
TANDEM_HOST_DEVICE inline uint64_t PartOf(uint64_t total, double fraction) {
  const uint64_t part = static_cast<uint64_t>(fraction * static_cast<double>(total));
  return part < total ? part : total;
}

// What the most likely tokens together must reach to be the nucleus of `top_p`.
TANDEM_HOST_DEVICE inline uint64_t NucleusWeight(uint64_t total, float top_p) {
  const uint64_t wanted = PartOf(total, static_cast<double>(top_p));
  return wanted > 0 ? wanted : 1;
}

// The first token, in the order of ids, with which the sum of weights is beyond this is drawn.
TANDEM_HOST_DEVICE inline uint64_t DrawTarget(uint64_t total, double uniform) {
  const uint64_t target = PartOf(total, uniform);
  return target < total ? target : total - 1;
}

}  // namespace tandem::engine
