// The linear layers of Qwen2.5-7B for many rows on one GPU, each over 28 layers' distinct random
// weights, beside the ceilings of the same run.
//
//   cuda_prefill_bench [--rows count,...] [--whole] [--no-overlap]
//
// --whole: no scratch memory, so that no tile is cut.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "bench/cuda_timing.cuh"
#include "bench/usage.h"
#include "engine/kernels/cuda/hopper_linear.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

constexpr int kHidden = 3584, kHeads = 28, kKvHeads = 4, kDim = 128, kInner = 18944;
constexpr int kVocab = 152064, kLayers = 28, kBlockSize = 16;
constexpr int kQWidth = kHeads * kDim, kQkvWidth = (kHeads + 2 * kKvHeads) * kDim;

struct Layer {
  DeviceArray<BFloat16> qkv, output, gate_up, down;
};

struct Model {
  Model() {
    const float scale = 0.03f;
    for (int i = 0; i < kLayers; ++i) {
      const uint64_t seed = static_cast<uint64_t>(i) * 8 + 10;
      layers.push_back({RandomArray<BFloat16>(1ull * kQkvWidth * kHidden, seed, scale),
                        RandomArray<BFloat16>(1ull * kHidden * kQWidth, seed + 1, scale),
                        RandomArray<BFloat16>(2ull * kInner * kHidden, seed + 2, scale),
                        RandomArray<BFloat16>(1ull * kHidden * kInner, seed + 3, scale)});
    }
    head = RandomArray<BFloat16>(1ull * kVocab * kHidden, 2, scale);
    bias = RandomArray<float>(kQkvWidth, 3, scale);
    norm = RandomArray<float>(kHidden, 4, 0.1f, 1);
  }
  std::vector<Layer> layers;
  DeviceArray<BFloat16> head;
  DeviceArray<float> bias, norm;
};

// The products of a step of `rows` rows.
class Step {
 public:
  Step(const Model& model, int rows, bool whole, const LaunchOptions& options)
      : model_(model), rows_(rows), options_(options) {
    const size_t n = static_cast<size_t>(rows);
    scaled_ = RandomArray<BFloat16>(n * kHidden, 5);
    attended_ = RandomArray<BFloat16>(n * kQWidth, 6);
    gated_ = RandomArray<BFloat16>(n * kInner, 7);
    q_ = DeviceArray<BFloat16>(n * kQWidth);
    // What products write is not what others here read, so that the numbers stay in range.
    out_ = DeviceArray<BFloat16>(n * kInner);
    kv_ = DeviceArray<BFloat16>((n + kBlockSize) * 2 * kKvHeads * kDim);
    residual_ = RandomArray<float>(n * kHidden, 8);
    cos_ = RandomArray<float>(n * kDim / 2, 9);
    sin_ = RandomArray<float>(n * kDim / 2, 10);
    shares_ = RandomArray<float>(n * kParts, 11, 1, kHidden / kParts);
    out_shares_ = DeviceArray<float>(n * kParts);
    logits_ = DeviceArray<float>(std::min<size_t>(n, kMostLogits) * kVocab);
    std::vector<int64_t> slots;
    for (int row = 0; row < rows; ++row) {
      slots.push_back((row / kBlockSize * 2 * kKvHeads * kBlockSize + row % kBlockSize) * kDim);
    }
    slots_ = DeviceArray<int64_t>(slots);
    if (!whole) {
      partial_ = DeviceArray<float>(HopperPartialFloats(options.multiprocessors));
      flags_ = DeviceArray<uint32_t>(HopperFlags(options.multiprocessors));
      flags_.Zero();
    }
  }

  void Qkv(int i) const {
    TANDEM_CUDA_CHECK(HopperQkv({LayerAt(i).qkv.get(), model_.bias.get(), scaled_.get(), q_.get(),
                                 kv_.get(), cos_.get(), sin_.get(), slots_.get(), rows_, kHeads,
                                 kKvHeads, kDim, kBlockSize, kHidden, Squares(), kEpsilon},
                                Scratch(), options_));
  }
  void Output(int i) const { Residual(LayerAt(i).output.get(), attended_.get(), kQWidth); }
  void GateUp(int i) const {
    TANDEM_CUDA_CHECK(HopperGateUp({LayerAt(i).gate_up.get(), scaled_.get(), out_.get(), rows_,
                                    kInner, kHidden, Squares(), kEpsilon},
                                   Scratch(), options_));
  }
  void Down(int i) const { Residual(LayerAt(i).down.get(), gated_.get(), kInner); }
  void Logits() const {
    TANDEM_CUDA_CHECK(
        HopperLogits({model_.head.get(), scaled_.get(), logits_.get(), nullptr,
                      std::min(rows_, kMostLogits), kVocab, kHidden, Squares(), kEpsilon},
                     Scratch(), options_));
  }

  static constexpr int kMostLogits = 256;

 private:
  static constexpr float kEpsilon = 1e-6f;
  static constexpr int kParts = 28;
  const Layer& LayerAt(int i) const { return model_.layers[static_cast<size_t>(i)]; }
  HopperScratch Scratch() const { return {partial_.get(), flags_.get()}; }
  SquareSums Squares() const { return {shares_.get(), kParts, rows_}; }
  void Residual(const BFloat16* weight, const BFloat16* x, int inputs) const {
    TANDEM_CUDA_CHECK(HopperResidual({weight, x, residual_.get(), model_.norm.get(), q_.get(),
                                      out_shares_.get(), rows_, rows_, kHidden, inputs},
                                     Scratch(), options_));
  }

  const Model& model_;
  int rows_;
  LaunchOptions options_;
  DeviceArray<BFloat16> scaled_, attended_, gated_, q_, out_, kv_;
  DeviceArray<float> residual_, cos_, sin_, shares_, out_shares_, logits_, partial_;
  DeviceArray<int64_t> slots_;
  DeviceArray<uint32_t> flags_;
};

void BenchRows(const Model& model, int rows, bool whole, double bandwidth,
               const LaunchOptions& options) {
  const Step step(model, rows, whole, options);
  const int logit_rows = std::min(rows, Step::kMostLogits);
  const struct {
    const char* name;
    double weights;
    int rows, calls;
    std::function<void(int)> run;
  } products[] = {
      {"qkv", 1.0 * kQkvWidth * kHidden, rows, kLayers, [&](int i) { step.Qkv(i); }},
      {"output", 1.0 * kHidden * kQWidth, rows, kLayers, [&](int i) { step.Output(i); }},
      {"gate_up", 2.0 * kInner * kHidden, rows, kLayers, [&](int i) { step.GateUp(i); }},
      {"down", 1.0 * kHidden * kInner, rows, kLayers, [&](int i) { step.Down(i); }},
      {"logits", 1.0 * kVocab * kHidden, logit_rows, 3, [&](int) { step.Logits(); }},
  };
  double layers = 0, weights = 0;
  for (const auto& p : products) {
    const double ms = MedianMs(options.stream, rows > 1000 ? 3 : 7,
                               [&] {
                                 for (int i = 0; i < p.calls; ++i) p.run(i);
                               }) /
                      p.calls;
    std::printf("  %-8s rows %5d %9.2f us  %6.1f TFLOP/s  %6.0f GB/s of weights (%.3f)\n", p.name,
                p.rows, ms * 1e3, 2e-9 * p.weights * p.rows / ms, 2e-6 * p.weights / ms,
                2e3 * p.weights / ms / bandwidth);
    std::fflush(stdout);
    if (p.calls == kLayers) {
      layers += ms * kLayers;
      weights += p.weights * kLayers;
    }
  }
  const double together = MedianMs(options.stream, rows > 1000 ? 2 : 7, [&] {
    for (int i = 0; i < kLayers; ++i) {
      step.Qkv(i);
      step.Output(i);
      step.GateUp(i);
      step.Down(i);
    }
  });
  std::printf("  28 layers rows %d: sum %.3f ms, in turn %.3f ms: %.1f TFLOP/s, %.0f GB/s\n", rows,
              layers, together, 2e-9 * weights * rows / together, 2e-6 * weights / together);
  std::fflush(stdout);
}

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(by, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

void Main(int argc, char** argv) {
  std::string rows = "64,256,512,4096";
  bool whole = false;
  LaunchOptions options;
  cudaDeviceProp properties;
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  options.multiprocessors = properties.multiProcessorCount;
  options.overlap = true;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--no-overlap") options.overlap = false;
    if (flag == "--whole") whole = true;
    if (flag == "--rows" && i + 1 < argc) rows = argv[++i];
  }
  TANDEM_CUDA_CHECK(cudaStreamCreate(&options.stream));
  const double bandwidth = ReadBandwidth(options.stream, options);
  std::printf("%s, %d multiprocessors: read %.0f GB/s\n", properties.name, options.multiprocessors,
              bandwidth * 1e-9);
  const Model model;
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  for (const std::string& count : Split(rows, ',')) {
    BenchRows(model, std::stoi(count), whole, bandwidth, options);
  }
}

}  // namespace
}  // namespace tandem::engine::cuda

int main(int argc, char** argv) {
  if (tandem::AnswerHelp(argc, argv,
                         "cuda_prefill_bench [--rows COUNT,...] [--whole] [--no-overlap]")) {
    return 0;
  }
  tandem::engine::cuda::Main(argc, argv);
  return 0;
}
