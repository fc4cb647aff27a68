// Rotary position embedding (Su et al., 2021, arXiv:2104.09864), with YaRN (Peng et al., 2023,
// arXiv:2309.00071) and Llama 3.1's scaling. Frequencies, attention factor and rounding to float32
// are those of Hugging Face transformers. Computed on the host once, for every device.
#pragma once

#include <vector>

namespace tandem::engine {

struct RopeYarn {
  double factor = 1;
  int original_max_position = 0;  // tokens
  double beta_fast = 32;
  double beta_slow = 1;
};

struct RopeLlama3 {
  double factor = 1;
  double low_freq_factor = 1;     // turns over the original length up to which a frequency is slow
  double high_freq_factor = 4;    // and from which it is fast
  int original_max_position = 0;  // tokens
};

// The head_dim / 2 frequencies theta^(-2i / head_dim), radians per position.
std::vector<float> RopeFrequencies(int head_dim, double theta);
// The same, stretched by YaRN.
std::vector<float> RopeFrequenciesYarn(int head_dim, double theta, const RopeYarn& yarn);
// The same with slow frequencies divided by `factor`, fast ones kept, and those between mixed.
std::vector<float> RopeFrequenciesLlama3(int head_dim, double theta, const RopeLlama3& scaling);
// 0.1 ln(factor) + 1, or 1 for factors up to 1.
float YarnAttentionFactor(double factor);

}  // namespace tandem::engine
