// Products of 4-bit weights against plain ones in float64: the weights' definition read literally,
// on the same bfloat16 activations.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "engine/kernels/cuda/hopper_int4_linear.h"
#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/skinny_linear.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/int4_weights.cuh"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

int failures = 0;

void Expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

double ToDouble(float value) { return value; }
double ToDouble(BFloat16 value) { return __bfloat162float(value); }

// ||got - wanted|| / ||wanted|| must not exceed `limit`; NaN anywhere exceeds it.
template <typename T>
void ExpectClose(const std::vector<T>& got, const std::vector<double>& wanted, double limit,
                 const std::string& what) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double d = ToDouble(got[i]) - wanted[i];
    difference += d * d;
    norm += wanted[i] * wanted[i];
  }
  const double error = std::sqrt(difference / norm);
  Expect(error <= limit, what + ": relative error " + std::to_string(error));
}

constexpr double kBFloat16Limit = 2.5e-3;  // of a result rounded to bfloat16
constexpr double kFloat32Limit = 2e-5;
constexpr float kEpsilon = 1e-6f;

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, inner;
};
constexpr Shape kShapes[] = {
    // For tools that make everything a hundred times slower; inputs that fill no block.
    {"small", 160, 4, 2, 40, 232},
    {"0.5b", 896, 14, 2, 64, 4864},
    {"7b", 3584, 28, 4, 128, 18944},
};

// Whose products.
struct Products {
  const char* name;
  decltype(&Int4GateUp) gate_up;
  decltype(&Int4Qkv) qkv;
  decltype(&Int4Residual) residual;
  decltype(&Int4SquareParts) square_parts;
};
constexpr Products kEveryCard = {"", Int4GateUp, Int4Qkv, Int4Residual, Int4SquareParts};
constexpr Products kHopper = {"hopper ", HopperInt4GateUp, HopperInt4Qkv, HopperInt4Residual,
                              HopperInt4SquareParts};

struct Fixture {
  Fixture(const Shape& s, int group, bool sym, int shared_bytes, bool overlap)
      : shape(s), group_size(group), symmetric(sym) {
    cudaDeviceProp properties;
    TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    options.multiprocessors = properties.multiProcessorCount;
    options.shared_bytes = shared_bytes;
    options.overlap = overlap && properties.major >= 9;
    is_hopper = properties.major == 9;
    partial = DeviceArray<float>(Int4PartialFloats(options.multiprocessors));
    partial.Poison();
    counters = DeviceArray<uint32_t>(kInt4Counters);
    counters.Zero();
    turns = DeviceArray<uint32_t>(kTurns);
    turns.Zero();
    shares = RandomArray<float>(1ull * kParts * kMaxInt4Rows, 3, 5, 6);
  }
  Int4Scratch Scratch() const { return {partial.get(), counters.get(), turns.get()}; }
  SquareSums Squares() const { return {shares.get(), kParts, kMaxInt4Rows}; }
  std::vector<double> InverseRms(int rows, int inputs) const {
    const std::vector<float> values = shares.ToHost();
    std::vector<double> out;
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int part = 0; part < kParts; ++part) sum += values[part * kMaxInt4Rows + row];
      out.push_back(1 / std::sqrt(sum / inputs + kEpsilon));
    }
    return out;
  }
  Int4Weights Weights(Int4Pairs pairs, int outputs, int inputs) const {
    return Int4Weights(
        Int4Layout::Of(pairs, shape.head_dim, outputs, inputs, group_size < 0 ? inputs : group_size,
                       options.multiprocessors),
        static_cast<uint64_t>(outputs) + 17, 0.02f, symmetric, true);
  }
  std::vector<double> Reference(const Int4Weights& w, const DeviceArray<BFloat16>& x, int rows,
                                const std::vector<double>& inverse_rms) const {
    DeviceArray<double> out(static_cast<size_t>(rows) * w.layout.outputs), scales;
    if (!inverse_rms.empty()) scales = DeviceArray<double>(inverse_rms);
    ReferenceInt4<<<dim3((w.layout.outputs + 127) / 128, rows), 128>>>(
        w.rows_of_values.get(), w.rows_of_scales.get(), w.layout, x.get(), scales.get(), out.get());
    return out.ToHost();
  }
  std::string Name(const char* test, int rows) const {
    return std::string(products.name) + test + " " + shape.name + " groups of " +
           std::to_string(group_size) + (symmetric ? " symmetric" : "") + " rows " +
           std::to_string(rows) + " shared " + std::to_string(options.shared_bytes);
  }
  void ExpectCountersZero(const std::string& name) const {
    const auto zero = [](uint32_t v) { return v == 0; };
    const std::vector<uint32_t> counts = counters.ToHost(), taken = turns.ToHost();
    Expect(std::all_of(counts.begin(), counts.end(), zero), name + ": counters are as they were");
    Expect(std::all_of(taken.begin(), taken.end(), zero), name + ": all turns have ended");
  }

  static constexpr int kParts = 37;
  Products products = kEveryCard;
  bool is_hopper = false;
  Shape shape;
  int group_size;
  bool symmetric;
  LaunchOptions options;
  DeviceArray<float> partial, shares;
  DeviceArray<uint32_t> counters, turns;
};

void GateUpMatches(const Fixture& f, const Int4Weights& w, int rows) {
  const Shape& s = f.shape;
  const std::string name = f.Name("gate_up", rows);
  const auto x = RandomArray<BFloat16>(1ull * rows * s.hidden, 5);
  DeviceArray<BFloat16> out(1ull * rows * s.inner);
  out.Poison();
  GateUpArgs args;
  args.x = x.get();
  args.out = out.get();
  args.rows = rows;
  args.inner = s.inner;
  args.inputs = s.hidden;
  args.squares = f.Squares();
  args.epsilon = kEpsilon;
  TANDEM_CUDA_CHECK(f.products.gate_up(args, w.matrix(), f.Scratch(), f.options));
  const std::vector<BFloat16> got = out.ToHost();
  const std::vector<double> sums = f.Reference(w, x, rows, f.InverseRms(rows, s.hidden));
  std::vector<double> wanted(got.size());
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < s.inner; ++i) {
      const double gate = sums[2ull * row * s.inner + i];
      wanted[1ull * row * s.inner + i] =
          gate / (1 + std::exp(-gate)) * sums[(2ull * row + 1) * s.inner + i];
    }
  }
  ExpectClose(got, wanted, kBFloat16Limit, name);
  f.ExpectCountersZero(name);
}

void ResidualMatches(const Fixture& f, const Int4Weights& w, int rows) {
  const int outputs = w.layout.outputs, inputs = w.layout.inputs;
  const std::string name = f.Name("residual", rows) + " inputs " + std::to_string(inputs);
  const auto x = RandomArray<BFloat16>(1ull * rows * inputs, 6);
  const auto residual = RandomArray<float>(1ull * rows * outputs, 7);
  const auto norm = RandomArray<float>(outputs, 8, 0.1f, 1);
  const std::vector<float> before = residual.ToHost();
  DeviceArray<BFloat16> scaled(1ull * rows * outputs);
  DeviceArray<float> squares(1ull * kMaxSquareParts * kMaxInt4Rows);
  scaled.Poison();
  squares.Poison();
  ResidualArgs args;
  args.x = x.get();
  args.residual = residual.get();
  args.norm_weight = norm.get();
  args.scaled = scaled.get();
  args.square_shares = squares.get();
  args.square_stride = kMaxInt4Rows;
  args.rows = rows;
  args.outputs = outputs;
  args.inputs = inputs;
  TANDEM_CUDA_CHECK(f.products.residual(args, w.matrix(), f.Scratch(), f.options));
  const std::vector<double> sums = f.Reference(w, x, rows, {});
  const std::vector<float> weights = norm.ToHost(), shares = squares.ToHost();
  std::vector<double> wanted, wanted_scaled, wanted_squares, got_squares;
  const int parts = f.products.square_parts(w.matrix(), rows, f.options);
  Expect(parts <= kMaxSquareParts, name + ": parts of the sums of squares");
  for (int row = 0; row < rows; ++row) {
    double square = 0, got = 0;
    for (int i = 0; i < outputs; ++i) {
      const size_t at = 1ull * row * outputs + i;
      wanted.push_back(before[at] + sums[at]);
      wanted_scaled.push_back(wanted.back() * weights[i]);
      square += wanted.back() * wanted.back();
    }
    for (int part = 0; part < parts; ++part) got += shares[part * kMaxInt4Rows + row];
    wanted_squares.push_back(square);
    got_squares.push_back(got);
  }
  ExpectClose(residual.ToHost(), wanted, kFloat32Limit, name);
  ExpectClose(scaled.ToHost(), wanted_scaled, kBFloat16Limit, name + " scaled");
  ExpectClose(std::vector<float>(got_squares.begin(), got_squares.end()), wanted_squares,
              kFloat32Limit, name + " squares");
  f.ExpectCountersZero(name);
}

void QkvMatches(const Fixture& f, const Int4Weights& w, int rows) {
  const Shape& s = f.shape;
  const std::string name = f.Name("qkv", rows);
  constexpr int kBlockSize = 16;
  const int heads = s.heads + 2 * s.kv_heads, outputs = heads * s.head_dim, half = s.head_dim / 2;
  const auto x = RandomArray<BFloat16>(1ull * rows * s.hidden, 9);
  const auto bias = RandomArray<float>(outputs, 10);
  const auto cos = RandomArray<float>(1ull * rows * half, 11);
  const auto sin = RandomArray<float>(1ull * rows * half, 12);
  // A block for each row, at some place in it; the second row has none.
  const int64_t block = 2ll * s.kv_heads * kBlockSize * s.head_dim;
  std::vector<int64_t> slots;
  for (int row = 0; row < rows; ++row) {
    slots.push_back(row == 1 ? -1 : row * block + row % kBlockSize * s.head_dim);
  }
  const DeviceArray<int64_t> device_slots(slots);
  DeviceArray<BFloat16> q(1ull * rows * s.heads * s.head_dim), kv(rows * block);
  q.Poison();
  kv.Poison();
  QkvArgs args;
  args.bias = bias.get();
  args.x = x.get();
  args.q = q.get();
  args.kv = kv.get();
  args.cos = cos.get();
  args.sin = sin.get();
  args.slots = device_slots.get();
  args.rows = rows;
  args.heads = s.heads;
  args.kv_heads = s.kv_heads;
  args.head_dim = s.head_dim;
  args.block_size = kBlockSize;
  args.inputs = s.hidden;
  args.squares = f.Squares();
  args.epsilon = kEpsilon;
  TANDEM_CUDA_CHECK(f.products.qkv(args, w.matrix(), f.Scratch(), f.options));
  const std::vector<double> sums = f.Reference(w, x, rows, f.InverseRms(rows, s.hidden));
  const std::vector<float> b = bias.ToHost(), c = cos.ToHost(), n = sin.ToHost();
  const std::vector<BFloat16> got_q = q.ToHost(), got_kv = kv.ToHost();
  std::vector<double> wanted, got;
  for (int row = 0; row < rows; ++row) {
    for (int head = 0; head < heads; ++head) {
      for (int e = 0; e < s.head_dim; ++e) {
        const auto at = [&](int element) {
          return sums[1ull * row * outputs + head * s.head_dim + element] +
                 b[head * s.head_dim + element];
        };
        double value = at(e);
        if (head < s.heads + s.kv_heads) {
          const int i = row * half + e % half;
          value =
              e < half ? at(e) * c[i] - at(e + half) * n[i] : at(e) * c[i] + at(e - half) * n[i];
        }
        if (head >= s.heads && slots[row] < 0) continue;
        const double result = ToDouble(
            head < s.heads
                ? got_q[(1ull * row * s.heads + head) * s.head_dim + e]
                : got_kv[slots[row] + 1ll * (head - s.heads) * kBlockSize * s.head_dim + e]);
        wanted.push_back(value);
        got.push_back(result);
      }
    }
  }
  ExpectClose(std::vector<float>(got.begin(), got.end()), wanted, kBFloat16Limit, name);
  f.ExpectCountersZero(name);
}

__global__ void PlainDequantise(const uint32_t* values, const uint32_t* scales, Int4Layout layout,
                                BFloat16* out) {
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
  if (k >= layout.inputs) return;
  out[static_cast<size_t>(row) * layout.inputs + k] =
      __float2bfloat16_rn(Int4WeightAt(values, scales, layout, row, k));
}

void DequantisedMatches(const Fixture& f, const Int4Weights& w) {
  const Int4Layout& l = w.layout;
  DeviceArray<BFloat16> got(1ull * l.outputs * l.inputs), wanted(got.size());
  got.Poison();
  TANDEM_CUDA_CHECK(DequantiseInt4(l, w.matrix(), nullptr, got.get(), f.options));
  PlainDequantise<<<dim3((l.inputs + 127) / 128, l.outputs), 128>>>(
      w.rows_of_values.get(), w.rows_of_scales.get(), l, wanted.get());
  const std::vector<BFloat16> a = got.ToHost(), b = wanted.ToHost();
  Expect(std::memcmp(a.data(), b.data(), a.size() * sizeof(BFloat16)) == 0,
         f.Name("dequantised", 0) + " " + std::to_string(l.outputs) + " x " +
             std::to_string(l.inputs));
}

// `only`: the name of a shape, or null for all.
void RunAll(const char* only) {
  int device_bytes = 0;
  TANDEM_CUDA_CHECK(
      cudaDeviceGetAttribute(&device_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  for (const Shape& shape : kShapes) {
    if (only != nullptr && std::strcmp(only, shape.name) != 0) continue;
    const bool large = std::strcmp(shape.name, "7b") == 0;
    for (const int group : {32, 64, 128, -1}) {
      if (large && group != 128 && group != 32) continue;
      for (const bool symmetric : {false, true}) {
        if (symmetric && group != 128) continue;
        // The device's own shared memory, and that of sm_89.
        for (const int shared_bytes : {device_bytes, 99 << 10}) {
          if (shared_bytes != device_bytes && (symmetric || group == 64)) continue;
          Fixture f(shape, group, symmetric, shared_bytes, group != 64);
          const int q_width = shape.heads * shape.head_dim;
          const Int4Weights gate_up = f.Weights(Int4Pairs::kHalves, 2 * shape.inner, shape.hidden);
          const Int4Weights qkv = f.Weights(
              Int4Pairs::kHeads, q_width + 2 * shape.kv_heads * shape.head_dim, shape.hidden);
          const Int4Weights output = f.Weights(Int4Pairs::kRows, shape.hidden, q_width);
          const Int4Weights down = f.Weights(Int4Pairs::kRows, shape.hidden, shape.inner);
          for (const Int4Weights* w : {&gate_up, &qkv, &output, &down}) DequantisedMatches(f, *w);
          for (const int rows : {1, 2, 8, 9, 16, 17, 32, 33, 64}) {
            if (large && rows % 8 != 0 && rows != 1 && rows != 33) continue;
            for (const Products& products : {kEveryCard, kHopper}) {
              if (products.gate_up == kHopper.gate_up &&
                  !(f.is_hopper && SupportsHopperInt4Linear(rows, shape.hidden, f.options))) {
                continue;
              }
              f.products = products;
              GateUpMatches(f, gate_up, rows);
              QkvMatches(f, qkv, rows);
              ResidualMatches(f, output, rows);
              ResidualMatches(f, down, rows);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace tandem::engine::cuda

// What ctest takes for "skipped".
constexpr int kSkipped = 77;

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return kSkipped;
  }
  tandem::engine::cuda::RunAll(argc > 1 ? argv[1] : nullptr);
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  std::printf("%d failures\n", tandem::engine::cuda::failures);
  return tandem::engine::cuda::failures == 0 ? 0 : 1;
}
