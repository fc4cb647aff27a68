// A decode step of Qwen2.5-7B on one GPU: 28 layers with distinct random weights, as a CUDA graph,
// beside its floor in the same run: bytes that must be read / measured read bandwidth.
//
//   cuda_decode_bench [--steps batch:context,...] [--ops batch,...] [--without kernels,...]
//   [--int4] [--no-overlap]
//
// --int4: the layers' weights have 4 bits, symmetric, in groups of 128.
// --without names kernels of a layer by their first letters (q, a, o, g, d; l for the logits): the
// step is also measured without them, e.g. "a,qa,g".
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "bench/cuda_timing.cuh"
#include "bench/usage.h"
#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/hopper_int4_linear.h"
#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/step.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/int4_weights.cuh"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

constexpr int kHidden = 3584, kHeads = 28, kKvHeads = 4, kDim = 128, kInner = 18944;
constexpr int kVocab = 152064, kLayers = 28, kBlockSize = 16;
constexpr int kQWidth = kHeads * kDim, kQkvWidth = (kHeads + 2 * kKvHeads) * kDim;
constexpr size_t kBlockElements = 2ull * kKvHeads * kBlockSize * kDim;

// Bytes of weights that a step reads: everything but the embedding table.
constexpr double kLayerBytes =
    2.0 * (1.0 * kQkvWidth * kHidden + 1.0 * kHidden * kQWidth + 3.0 * kInner * kHidden);
constexpr double kHeadBytes = 2.0 * kVocab * kHidden;
constexpr double kKvBytesPerToken = 2.0 * 2 * kKvHeads * kDim * kLayers;

struct Layer {
  DeviceArray<BFloat16> qkv, output, gate_up, down;
  DeviceArray<float> bias, input_norm, post_norm;
};
struct Int4Layer {
  Int4Weights qkv, output, gate_up, down;
};

struct Model {
  Model(bool is_int4, int multiprocessors) : int4(is_int4) {
    const float scale = 0.03f;
    const auto random = [&](size_t count, uint64_t seed) {
      return int4 ? DeviceArray<BFloat16>() : RandomArray<BFloat16>(count, seed, scale);
    };
    const auto random_int4 = [&](Int4Pairs pairs, int outputs, int inputs, uint64_t seed) {
      return Int4Weights(Int4Layout::Of(pairs, kDim, outputs, inputs, 128, multiprocessors), seed,
                         scale / 8, true, false);
    };
    for (int i = 0; i < kLayers; ++i) {
      const uint64_t seed = static_cast<uint64_t>(i) * 8 + 10;
      if (int4) {
        int4_layers.push_back({random_int4(Int4Pairs::kHeads, kQkvWidth, kHidden, seed + 1000),
                               random_int4(Int4Pairs::kRows, kHidden, kQWidth, seed + 1002),
                               random_int4(Int4Pairs::kHalves, 2 * kInner, kHidden, seed + 1004),
                               random_int4(Int4Pairs::kRows, kHidden, kInner, seed + 1006)});
      }
      layers.push_back(
          {random(1ull * kQkvWidth * kHidden, seed), random(1ull * kHidden * kQWidth, seed + 2),
           random(2ull * kInner * kHidden, seed + 3), random(1ull * kHidden * kInner, seed + 4),
           RandomArray<float>(kQkvWidth, seed + 1, scale),
           RandomArray<float>(kHidden, seed + 5, 0.1f, 1),
           RandomArray<float>(kHidden, seed + 6, 0.1f, 1)});
    }
    embedding = RandomArray<BFloat16>(1ull * kVocab * kHidden, 1, 0.5f);
    head = RandomArray<BFloat16>(1ull * kVocab * kHidden, 2, scale);
    final_norm = RandomArray<float>(kHidden, 3, 0.1f, 1);
    std::vector<float> values;
    for (int i = 0; i < kDim / 2; ++i) {
      values.push_back(static_cast<float>(std::pow(1e6, -2.0 * i / kDim)));
    }
    frequencies = DeviceArray<float>(values);
  }
  // Of a layer's weights.
  double LayerBytes() const {
    if (!int4) return kLayerBytes;
    const Int4Layer& layer = int4_layers[0];
    return layer.qkv.bytes() + layer.output.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }

  const bool int4;
  std::vector<Layer> layers;
  std::vector<Int4Layer> int4_layers;
  DeviceArray<BFloat16> embedding, head;
  DeviceArray<float> final_norm, frequencies;
};

// The buffers of a step, and the step itself.
class Step {
 public:
  Step(const Model& model, int rows, int context, const LaunchOptions& options)
      : model_(model), rows_(rows), context_(context), options_(options) {
    int major = 0;
    TANDEM_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    hopper_int4_ = major == 9 && SupportsHopperInt4Linear(rows, kHidden, options);
    const size_t n = static_cast<size_t>(rows);
    const int item_blocks = (context + kBlockSize - 1) / kBlockSize;
    const size_t blocks = n * static_cast<size_t>(item_blocks);
    pool_ = DeviceArray<BFloat16>(blocks * kBlockElements * kLayers);
    FillRandom(pool_.get(), pool_.size(), 99);
    std::vector<int32_t> order(blocks);
    // A fixed scatter: multiplication by a number without common divisor.
    const size_t step = blocks % 7919 == 0 ? 1 : 7919;
    for (size_t i = 0; i < blocks; ++i) order[i] = static_cast<int32_t>(i * step % blocks);
    blocks_ = DeviceArray<int32_t>(order);
    positions_ = DeviceArray<int32_t>(std::vector<int32_t>(n, context - 1));
    std::vector<int32_t> first_rows, first_blocks;
    for (int i = 0; i <= rows; ++i) {
      first_rows.push_back(i);
      first_blocks.push_back(i * item_blocks);
    }
    first_rows_ = DeviceArray<int32_t>(first_rows);
    first_blocks_ = DeviceArray<int32_t>(first_blocks);
    tokens_ = DeviceArray<int32_t>(std::vector<int32_t>(n, 42));
    items_ = DeviceArray<DecodeItem>(n + 1);
    slots_ = DeviceArray<int64_t>(n);
    cos_ = DeviceArray<float>(n * kDim / 2);
    sin_ = DeviceArray<float>(n * kDim / 2);
    residual_ = DeviceArray<float>(n * kHidden);
    scaled_ = DeviceArray<BFloat16>(n * kHidden);
    q_ = DeviceArray<BFloat16>(n * kQWidth);
    attended_ = DeviceArray<BFloat16>(n * kQWidth);
    gated_ = DeviceArray<BFloat16>(n * kInner);
    first_share_ = DeviceArray<float>(kMaxSkinnyRows);
    shares_ = DeviceArray<float>(1ull * kMaxSquareParts * kMaxSkinnyRows);
    const int multiprocessors = options.multiprocessors;
    best_parts_ = LogitsBestParts(rows, kVocab, kHidden, options);
    best_ = DeviceArray<uint64_t>(static_cast<size_t>(best_parts_) * kMaxSkinnyRows);
    partial_ = DeviceArray<float>(SkinnyPartialFloats(multiprocessors));
    attention_parts_ = DeviceArray<uint64_t>(DecodeAttentionParts(kDim, multiprocessors));
    attention_parts_.Zero();
    counters_ = DeviceArray<uint32_t>(kSkinnyCounters);
    counters_.Zero();
    int4_partial_ = DeviceArray<float>(Int4PartialFloats(multiprocessors));
    int4_counters_ = DeviceArray<uint32_t>(kInt4Counters);
    int4_counters_.Zero();
    turns_ = DeviceArray<uint32_t>(kTurns);
    turns_.Zero();
    attention_launches_ = DeviceArray<uint32_t>(static_cast<size_t>(multiprocessors));
    attention_launches_.Zero();
  }

  double Bytes() const {
    return kLayers * model_.LayerBytes() + kHeadBytes + kKvBytesPerToken * context_ * rows_;
  }

  // `without`: first letters of the kernels left out, to see what they cost within the step.
  void Run(const std::string& without = "") {
    const auto with = [&](char kernel) { return without.find(kernel) == std::string::npos; };
    // The ends of a step have few thread blocks: a kernel that starts beside them would not spread
    // evenly over the multiprocessors.
    const LaunchOptions o = options_;
    options_.overlap = false;
    Prepare();
    SquareSums squares = {first_share_.get(), 1, kMaxSkinnyRows};
    for (int i = 0; i < kLayers; ++i) {
      if (with('q')) Qkv(i, squares);
      options_ = o;
      if (with('a')) Attention(i);
      squares = {shares_.get(), SquareParts(i, false), kMaxSkinnyRows};
      if (with('o')) Output(i);
      if (with('g')) GateUp(i, squares);
      squares = {shares_.get(), SquareParts(i, true), kMaxSkinnyRows};
      if (with('d')) Down(i);
    }
    if (with('l')) Logits(squares);
    TANDEM_CUDA_CHECK(SelectGreedy(best_.get(), best_parts_, rows_, tokens_.get(), o));
  }

  void Prepare() {
    TANDEM_CUDA_CHECK(PrepareStep({tokens_.get(),
                                   positions_.get(),
                                   first_rows_.get(),
                                   positions_.get(),
                                   first_blocks_.get(),
                                   blocks_.get(),
                                   nullptr,
                                   model_.embedding.get(),
                                   model_.layers[0].input_norm.get(),
                                   model_.frequencies.get(),
                                   residual_.get(),
                                   scaled_.get(),
                                   first_share_.get(),
                                   cos_.get(),
                                   sin_.get(),
                                   slots_.get(),
                                   items_.get(),
                                   rows_,
                                   rows_,
                                   kHidden,
                                   kKvHeads,
                                   kDim,
                                   kBlockSize,
                                   1.0f},
                                  options_));
  }
  void Qkv(int i, SquareSums squares) {
    const Layer& layer = model_.layers[static_cast<size_t>(i)];
    const QkvArgs args{layer.qkv.get(), layer.bias.get(), scaled_.get(), q_.get(),
                       Pages(i),        cos_.get(),       sin_.get(),    slots_.get(),
                       rows_,           kHeads,           kKvHeads,      kDim,
                       kBlockSize,      kHidden,          squares,       kEpsilon};
    if (model_.int4) {
      TANDEM_CUDA_CHECK((hopper_int4_ ? HopperInt4Qkv : Int4Qkv)(args, Int4(i).qkv.matrix(),
                                                                 Int4Memory(), options_));
      return;
    }
    TANDEM_CUDA_CHECK(SkinnyQkv(args, Scratch(), options_));
  }
  void Attention(int i) {
    TANDEM_CUDA_CHECK(DecodeAttention(
        {q_.get(), Pages(i), items_.get(), blocks_.get(), attended_.get(), rows_, kHeads, kKvHeads,
         kDim, kBlockSize, 1 / std::sqrt(static_cast<float>(kDim))},
        {attention_parts_.get(), attention_launches_.get(), turns_.get()}, options_));
  }
  void Output(int i) {
    const Layer& layer = model_.layers[static_cast<size_t>(i)];
    const ResidualArgs args{layer.output.get(),
                            attended_.get(),
                            residual_.get(),
                            layer.post_norm.get(),
                            scaled_.get(),
                            shares_.get(),
                            kMaxSkinnyRows,
                            rows_,
                            kHidden,
                            kQWidth};
    Residual(args, i, &Int4Layer::output);
  }
  void GateUp(int i, SquareSums squares) {
    const Layer& layer = model_.layers[static_cast<size_t>(i)];
    const GateUpArgs args{layer.gate_up.get(),
                          scaled_.get(),
                          gated_.get(),
                          rows_,
                          kInner,
                          kHidden,
                          squares,
                          kEpsilon};
    if (model_.int4) {
      TANDEM_CUDA_CHECK((hopper_int4_ ? HopperInt4GateUp : Int4GateUp)(
          args, Int4(i).gate_up.matrix(), Int4Memory(), options_));
      return;
    }
    TANDEM_CUDA_CHECK(SkinnyGateUp(args, Scratch(), options_));
  }
  void Down(int i) {
    const Layer& layer = model_.layers[static_cast<size_t>(i)];
    const ResidualArgs args{layer.down.get(), gated_.get(),  residual_.get(), NextNorm(i),
                            scaled_.get(),    shares_.get(), kMaxSkinnyRows,  rows_,
                            kHidden,          kInner};
    Residual(args, i, &Int4Layer::down);
  }
  void Logits(SquareSums squares) {
    TANDEM_CUDA_CHECK(SkinnyLogits({model_.head.get(), scaled_.get(), nullptr, best_.get(), rows_,
                                    kVocab, kHidden, squares, kEpsilon},
                                   Scratch(), options_));
  }
  SquareSums FirstSquares() const { return {first_share_.get(), 1, kMaxSkinnyRows}; }

 private:
  static constexpr float kEpsilon = 1e-6f;
  const float* NextNorm(int i) const {
    return i + 1 < kLayers ? model_.layers[static_cast<size_t>(i + 1)].input_norm.get()
                           : model_.final_norm.get();
  }
  void Residual(const ResidualArgs& args, int i, Int4Weights Int4Layer::*weights) {
    if (model_.int4) {
      TANDEM_CUDA_CHECK((hopper_int4_ ? HopperInt4Residual : Int4Residual)(
          args, (Int4(i).*weights).matrix(), Int4Memory(), options_));
      return;
    }
    TANDEM_CUDA_CHECK(SkinnyResidual(args, Scratch(), options_));
  }
  const Int4Layer& Int4(int i) const { return model_.int4_layers[static_cast<size_t>(i)]; }
  // Of the output or the down projection.
  int SquareParts(int i, bool down) const {
    if (model_.int4) {
      return (hopper_int4_ ? HopperInt4SquareParts : Int4SquareParts)(
          (down ? Int4(i).down : Int4(i).output).matrix(), rows_, options_);
    }
    return ResidualSquareParts(rows_, kHidden, down ? kInner : kQWidth, options_);
  }
  Int4Scratch Int4Memory() const {
    return {int4_partial_.get(), int4_counters_.get(), turns_.get()};
  }
  SkinnyScratch Scratch() const { return {partial_.get(), counters_.get(), turns_.get()}; }
  BFloat16* Pages(int layer) const {
    return pool_.get() + pool_.size() / kLayers * static_cast<size_t>(layer);
  }

  const Model& model_;
  int rows_, context_, best_parts_;
  bool hopper_int4_ = false;
  LaunchOptions options_;
  DeviceArray<BFloat16> pool_, scaled_, q_, attended_, gated_;
  DeviceArray<int32_t> tokens_, positions_, first_rows_, first_blocks_, blocks_;
  DeviceArray<DecodeItem> items_;
  DeviceArray<int64_t> slots_;
  DeviceArray<float> cos_, sin_, residual_, first_share_, shares_, partial_, int4_partial_;
  DeviceArray<uint64_t> best_, attention_parts_;
  DeviceArray<uint32_t> counters_, turns_, attention_launches_, int4_counters_;
};

void PrintRow(const std::string& name, double ms, double floor_ms) {
  std::printf("%-32s %9.4f ms  floor %9.4f  ratio %.3f\n", name.c_str(), ms, floor_ms,
              ms / floor_ms);
  std::fflush(stdout);
}

// Each kernel of a layer, 28 times in a row over the layers' own weights.
void BenchOps(const Model& model, int rows, int context, double bandwidth,
              const LaunchOptions& options) {
  Step step(model, rows, context, options);
  step.Run();  // the buffers hold numbers
  const SquareSums squares = step.FirstSquares();
  const double kv = kKvBytesPerToken / kLayers * context * rows;
  const struct {
    const char* name;
    double bytes;
    std::function<void(int)> run;
  } ops[] = {
      {"qkv", model.int4 ? model.int4_layers[0].qkv.bytes() : 2.0 * kQkvWidth * kHidden,
       [&](int i) { step.Qkv(i, squares); }},
      {"attention", kv, [&](int i) { step.Attention(i); }},
      {"output", model.int4 ? model.int4_layers[0].output.bytes() : 2.0 * kHidden * kQWidth,
       [&](int i) { step.Output(i); }},
      {"gate_up", model.int4 ? model.int4_layers[0].gate_up.bytes() : 4.0 * kInner * kHidden,
       [&](int i) { step.GateUp(i, squares); }},
      {"down", model.int4 ? model.int4_layers[0].down.bytes() : 2.0 * kHidden * kInner,
       [&](int i) { step.Down(i); }},
      {"logits", kHeadBytes,
       [&](int i) {
         if (i < 4) step.Logits(squares);
       }},
  };
  for (const auto& op : ops) {
    const double calls = std::strcmp(op.name, "logits") == 0 ? 4 : kLayers;
    const double ms = MedianMs(options.stream, 9, [&] {
      for (int i = 0; i < kLayers; ++i) op.run(i);
    });
    PrintRow("  " + std::string(op.name) + " batch " + std::to_string(rows), ms / calls,
             op.bytes / bandwidth * 1e3);
  }
}

// What prefill pays for weights of 4 bits: a layer's, made bfloat16 before each of its products.
void BenchDequantise(const Model& model, double bandwidth, const LaunchOptions& options) {
  DeviceArray<BFloat16> out(2ull * kInner * kHidden);
  const double ms = MedianMs(options.stream, 9, [&] {
    for (const Int4Layer& layer : model.int4_layers) {
      for (const Int4Weights* w : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
        TANDEM_CUDA_CHECK(DequantiseInt4(w->layout, w->matrix(), nullptr, out.get(), options));
      }
    }
  });
  PrintRow("  all layers dequantised", ms,
           kLayers * (model.LayerBytes() + kLayerBytes) / bandwidth * 1e3);
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
  std::string steps = "1:2096,16:2096,64:2096,1:32816,1:131048", ops, ablations;
  bool int4 = false;
  LaunchOptions options;
  cudaDeviceProp properties;
  TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  options.multiprocessors = properties.multiProcessorCount;
  options.overlap = properties.major >= 9;
  TANDEM_CUDA_CHECK(
      cudaDeviceGetAttribute(&options.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--no-overlap") options.overlap = false;
    if (flag == "--int4") int4 = true;
    if (flag == "--steps" && i + 1 < argc) steps = argv[++i];
    if (flag == "--ops" && i + 1 < argc) ops = argv[++i];
    if (flag == "--without" && i + 1 < argc) ablations = argv[++i];
  }
  TANDEM_CUDA_CHECK(cudaStreamCreate(&options.stream));
  const double bandwidth = ReadBandwidth(options.stream, options);
  std::printf("%s, %d multiprocessors: read %.0f GB/s\n", properties.name, options.multiprocessors,
              bandwidth * 1e-9);
  const Model model(int4, options.multiprocessors);
  for (const std::string& step_name : Split(steps, ',')) {
    const std::vector<std::string> shape = Split(step_name, ':');
    const int rows = std::stoi(shape[0]), context = std::stoi(shape[1]);
    Step step(model, rows, context, options);
    const double ms = MedianMs(options.stream, 15, [&] { step.Run(); });
    PrintRow("step batch " + shape[0] + " context " + shape[1], ms, step.Bytes() / bandwidth * 1e3);
    for (const std::string& without : Split(ablations, ',')) {
      const double rest = MedianMs(options.stream, 9, [&] { step.Run(without); });
      std::printf("    without %-6s %9.4f ms: %7.2f us per layer\n", without.c_str(), rest,
                  (ms - rest) * 1e3 / kLayers);
    }
  }
  for (const std::string& batch : Split(ops, ',')) {
    BenchOps(model, std::stoi(batch), 2096, bandwidth, options);
  }
  if (int4 && !ops.empty()) BenchDequantise(model, bandwidth, options);
}

}  // namespace
}  // namespace tandem::engine::cuda

int main(int argc, char** argv) {
  if (tandem::AnswerHelp(argc, argv,
                         "cuda_decode_bench [--steps BATCH:CONTEXT,...] [--ops BATCH,...] "
                         "[--without KERNELS,...] [--int4] [--no-overlap]")) {
    return 0;
  }
  tandem::engine::cuda::Main(argc, argv);
  return 0;
}
