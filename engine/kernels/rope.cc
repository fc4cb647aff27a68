#include "engine/kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tandem::engine {
namespace {

// theta^(2i / head_dim) as a float32 tensor operation.
float RotationPeriod(int head_dim, double theta, int i) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
  return static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
}

// The (fractional) index of the frequency that turns `rotations` times over the original range.
double CorrectionDim(double rotations, int head_dim, double theta, int max_position) {
  return head_dim * std::log(max_position / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(theta));
}

}  // namespace

std::vector<float> RopeFrequencies(int head_dim, double theta) {
  std::vector<float> frequencies(static_cast<size_t>(head_dim) / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = 1.0f / RotationPeriod(head_dim, theta, static_cast<int>(i));
  }
  return frequencies;
}

std::vector<float> RopeFrequenciesYarn(int head_dim, double theta, const RopeYarn& yarn) {
  const int original = yarn.original_max_position;
  const double low =
      std::max(std::floor(CorrectionDim(yarn.beta_fast, head_dim, theta, original)), 0.0);
  double high =
      std::min(std::ceil(CorrectionDim(yarn.beta_slow, head_dim, theta, original)), head_dim - 1.0);
  if (low == high) high += 0.001;
  std::vector<float> frequencies(static_cast<size_t>(head_dim) / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float period = RotationPeriod(head_dim, theta, static_cast<int>(i));
    const float extrapolated = 1.0f / period;
    const float interpolated = 1.0f / (static_cast<float>(yarn.factor) * period);
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float keep = 1.0f - ramp;
    frequencies[i] = interpolated * (1.0f - keep) + extrapolated * keep;
  }
  return frequencies;
}

std::vector<float> RopeFrequenciesLlama3(int head_dim, double theta, const RopeLlama3& scaling) {
  const float factor = static_cast<float>(scaling.factor);
  const float low = static_cast<float>(scaling.low_freq_factor);
  const float high = static_cast<float>(scaling.high_freq_factor);
  const float original = static_cast<float>(scaling.original_max_position);
  const auto shortest = static_cast<float>(original / scaling.high_freq_factor);
  const auto longest = static_cast<float>(original / scaling.low_freq_factor);
  std::vector<float> frequencies = RopeFrequencies(head_dim, theta);
  for (float& frequency : frequencies) {
    const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;  // positions
    if (wavelength < shortest) continue;
    if (wavelength > longest) {
      frequency /= factor;
    } else {
      const float smooth = (original / wavelength - low) / (high - low);
      frequency = (1 - smooth) * frequency / factor + smooth * frequency;
    }
  }
  return frequencies;
}

float YarnAttentionFactor(double factor) {
  return factor <= 1 ? 1.0f : static_cast<float>(0.1 * std::log(factor) + 1.0);
}

}  // namespace tandem::engine
