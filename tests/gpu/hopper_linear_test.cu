// The products of hopper_linear.h against plain ones in float64 on the same bfloat16 inputs, for
// some rows of each: those at the borders of tiles, and every few in between.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engine/kernels/cuda/hopper_linear.h"
#include "engine/kernels/cuda/hopper_wide_linear.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

int failures = 0;

void Expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
  std::fflush(stdout);
}

double ToDouble(float value) { return value; }
double ToDouble(BFloat16 value) { return __bfloat162float(value); }

// Rounding of a result to bfloat16 costs 2^-9 at most, 0.29 of that on average.
constexpr double kBFloat16Limit = 2.5e-3;
// The tensor cores' sums in float32 are rounded towards zero: it adds up over 18,944 products.
constexpr double kFloat32Limit = 1e-4;

// out[i][n] = sum_k w[n][k] x[rows[i]][k]: a warp per output.
__global__ void ReferenceLinear(const BFloat16* w, const BFloat16* x, const int* rows, int outputs,
                                int inputs, double* out) {
  const int n = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (n >= outputs) return;
  const BFloat16* x_row = x + static_cast<int64_t>(rows[blockIdx.y]) * inputs;
  double sum = 0;
  for (int k = lane; k < inputs; k += 32) {
    sum += static_cast<double>(__bfloat162float(w[static_cast<int64_t>(n) * inputs + k])) *
           static_cast<double>(__bfloat162float(x_row[k]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0) out[static_cast<int64_t>(blockIdx.y) * outputs + n] = sum;
}

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, inner, vocab;
};
constexpr Shape kShapes[] = {
    {"odd", 200, 3, 1, 64, 136, 1003},
    {"0.5b", 896, 14, 2, 64, 4864, 15190},
    {"7b", 3584, 28, 4, 128, 18944, 152064},
};

std::vector<int> SomeRows(int rows) {
  std::vector<int> some;
  for (int row = 0; row < rows; ++row) {
    const int within = row % 64;
    const bool border = (within == 0 || within == 63 || within == 8) && row / 64 % 5 < 2;
    if (rows <= 32 || border || row == rows - 1 || row * 37 % rows < 24) some.push_back(row);
  }
  return some;
}

class Fixture {
 public:
  Fixture(const Shape& s, int rows, bool cut) : shape(s), rows(rows), some(SomeRows(rows)) {
    cudaDeviceProp properties;
    TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    options.multiprocessors = properties.multiProcessorCount;
    if (cut) {
      partial = DeviceArray<float>(HopperPartialFloats(options.multiprocessors));
      partial.Poison();
      flags = DeviceArray<uint32_t>(HopperFlags(options.multiprocessors));
      flags.Zero();
    }
    device_some = DeviceArray<int>(some);
    // Shares of the sums of squares, and the 1 / rms they stand for.
    stride = rows + 3;
    shares = RandomArray<float>(static_cast<size_t>(kParts) * stride, 5, 10, 100);
    const std::vector<float> host = shares.ToHost();
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int part = 0; part < kParts; ++part) sum += host[part * stride + row];
      inverse_rms.push_back(1 / std::sqrt(sum / s.hidden + kEpsilon));
    }
  }

  HopperScratch Scratch() const { return {partial.get(), flags.get()}; }
  SquareSums Squares() const { return {shares.get(), kParts, stride}; }
  std::string Name(const char* test) const {
    return std::string(test) + " " + shape.name + " rows " + std::to_string(rows) +
           (partial.get() != nullptr ? " cut" : "");
  }

  // [some][outputs].
  std::vector<double> Reference(const DeviceArray<BFloat16>& w, const DeviceArray<BFloat16>& x,
                                int outputs, int inputs, bool normed) const {
    DeviceArray<double> out(some.size() * static_cast<size_t>(outputs));
    ReferenceLinear<<<dim3((outputs + 7) / 8, static_cast<unsigned>(some.size())), 256>>>(
        w.get(), x.get(), device_some.get(), outputs, inputs, out.get());
    TANDEM_CUDA_CHECK(cudaGetLastError());
    std::vector<double> sums = out.ToHost();
    if (normed) {
      for (size_t i = 0; i < sums.size(); ++i) sums[i] *= inverse_rms[some[i / outputs]];
    }
    return sums;
  }

  // `wanted` is of some rows, `got` of all.
  template <typename T>
  void ExpectClose(const std::vector<T>& got, const std::vector<double>& wanted, double limit,
                   const std::string& what) const {
    const size_t columns = wanted.size() / some.size();
    double difference = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double d = ToDouble(got[some[i / columns] * columns + i % columns]) - wanted[i];
      difference += d * d;
      norm += wanted[i] * wanted[i];
    }
    const double error = std::sqrt(difference / norm);
    if (error <= limit) return;
    Expect(false, what + ": relative error " + std::to_string(error));
    // Which of the values are off by more than 10 % of the mean magnitude.
    const double large = 0.1 * std::sqrt(norm / static_cast<double>(wanted.size()));
    size_t bad = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const int row = some[i / columns];
      const double value = ToDouble(got[row * columns + i % columns]);
      if (std::abs(value - wanted[i]) <= large) continue;
      if (bad++ < 12) {
        std::printf("    row %d column %zu: %g, wanted %g\n", row, i % columns, value, wanted[i]);
      }
    }
    std::printf("    %zu of %zu\n", bad, wanted.size());
  }

  static constexpr int kParts = 37;
  static constexpr float kEpsilon = 1e-6f;
  Shape shape;
  int rows, stride;
  std::vector<int> some;
  DeviceArray<int> device_some;
  LaunchOptions options;
  DeviceArray<float> partial, shares;
  DeviceArray<uint32_t> flags;
  std::vector<double> inverse_rms;
};

// Runs `launch` three times into what `reset` prepares; the same bits must come of it.
template <typename T>
std::vector<T> RunThrice(const Fixture& f, const std::string& name, DeviceArray<T>* out,
                         const std::function<void()>& reset,
                         const std::function<cudaError_t()>& launch) {
  std::vector<T> first;
  for (int turn = 0; turn < 3; ++turn) {
    reset();
    const cudaError_t error = launch();
    Expect(error == cudaSuccess, name + ": launch: " + cudaGetErrorString(error));
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<T> got = out->ToHost();
    if (turn == 0) {
      first = std::move(got);
    } else {
      Expect(std::memcmp(first.data(), got.data(), got.size() * sizeof(T)) == 0,
             name + ": the same every time");
    }
  }
  if (f.flags.get() != nullptr) {
    const auto flags = f.flags.ToHost();
    Expect(std::all_of(flags.begin(), flags.end(), [](uint32_t v) { return v == 0; }),
           name + ": flags are left as they were found");
  }
  return first;
}

void GateUpMatches(const Fixture& f) {
  const int hidden = f.shape.hidden, inner = f.shape.inner;
  const auto w = RandomArray<BFloat16>(2ull * inner * hidden, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(f.rows) * hidden, 2);
  DeviceArray<BFloat16> out(static_cast<size_t>(f.rows) * inner);
  const auto got = RunThrice<BFloat16>(
      f, f.Name("gate_up"), &out, [&] { out.Poison(); },
      [&] {
        return HopperGateUp(
            {w.get(), x.get(), out.get(), f.rows, inner, hidden, f.Squares(), Fixture::kEpsilon},
            f.Scratch(), f.options);
      });
  const auto sums = f.Reference(w, x, 2 * inner, hidden, true);
  std::vector<double> wanted;
  for (size_t row = 0; row < f.some.size(); ++row) {
    for (int i = 0; i < inner; ++i) {
      const double gate = sums[row * 2 * inner + i], up = sums[row * 2 * inner + inner + i];
      wanted.push_back(gate / (1 + std::exp(-gate)) * up);
    }
  }
  f.ExpectClose(got, wanted, kBFloat16Limit, f.Name("gate_up"));
}

void ResidualMatches(const Fixture& f, int inputs) {
  const int outputs = f.shape.hidden;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(outputs) * inputs, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(f.rows) * inputs, 2);
  const auto g = RandomArray<float>(outputs, 3);
  const auto before = RandomArray<float>(static_cast<size_t>(f.rows) * outputs, 4);
  DeviceArray<float> residual(before.size());
  const int parts = HopperSquareParts(outputs);
  DeviceArray<BFloat16> scaled(before.size());
  DeviceArray<float> shares(static_cast<size_t>(parts) * f.stride);
  const std::string name = f.Name("residual") + " inputs " + std::to_string(inputs);
  const auto got = RunThrice<float>(
      f, name, &residual,
      [&] {
        scaled.Poison();
        shares.Poison();
        TANDEM_CUDA_CHECK(cudaMemcpy(residual.get(), before.get(), before.size() * sizeof(float),
                                     cudaMemcpyDeviceToDevice));
      },
      [&] {
        return HopperResidual({w.get(), x.get(), residual.get(), g.get(), scaled.get(),
                               shares.get(), f.stride, f.rows, outputs, inputs},
                              f.Scratch(), f.options);
      });
  std::vector<double> wanted = f.Reference(w, x, outputs, inputs, false);
  std::vector<double> wanted_scaled, wanted_squares(f.some.size());
  const auto weights = g.ToHost(), old = before.ToHost(), got_shares = shares.ToHost();
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] += old[static_cast<size_t>(f.some[i / outputs]) * outputs + i % outputs];
    wanted_scaled.push_back(wanted[i] * weights[i % outputs]);
    wanted_squares[i / outputs] += wanted[i] * wanted[i];
  }
  std::vector<float> squares(f.rows);
  for (int part = 0; part < parts; ++part) {
    for (int row = 0; row < f.rows; ++row) squares[row] += got_shares[part * f.stride + row];
  }
  f.ExpectClose(got, wanted, kFloat32Limit, name);
  f.ExpectClose(scaled.ToHost(), wanted_scaled, kBFloat16Limit, name + " scaled");
  f.ExpectClose(squares, wanted_squares, kFloat32Limit, name + " squares");
}

void QkvMatches(const Fixture& f) {
  const auto [name, hidden, heads, kv_heads, dim, inner, vocab] = f.shape;
  constexpr int kBlockSize = 32;
  const int outputs = (heads + 2 * kv_heads) * dim, half = dim / 2, rows = f.rows;
  const int blocks = rows + 3;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(outputs) * hidden, 1, 0.05f);
  const auto bias = RandomArray<float>(outputs, 6);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(rows) * hidden, 2);
  const auto cos = RandomArray<float>(static_cast<size_t>(rows) * half, 7);
  const auto sin = RandomArray<float>(static_cast<size_t>(rows) * half, 8);
  const size_t page = static_cast<size_t>(kBlockSize) * dim;
  // The third row pads the step.
  std::vector<int64_t> slots;
  for (int row = 0; row < rows; ++row) {
    slots.push_back(row == 2 ? -1
                             : static_cast<int64_t>((rows + 1 - row) * 2 * kv_heads * page) +
                                   row * 7 % kBlockSize * dim);
  }
  const DeviceArray<int64_t> device_slots(slots);
  DeviceArray<BFloat16> q(static_cast<size_t>(rows) * heads * dim);
  DeviceArray<BFloat16> kv(blocks * 2ull * kv_heads * page);
  const auto got_kv = RunThrice<BFloat16>(
      f, f.Name("qkv"), &kv,
      [&] {
        q.Poison();
        kv.Poison();
      },
      [&] {
        return HopperQkv({w.get(), bias.get(), x.get(), q.get(), kv.get(), cos.get(), sin.get(),
                          device_slots.get(), rows, heads, kv_heads, dim, kBlockSize, hidden,
                          f.Squares(), Fixture::kEpsilon},
                         f.Scratch(), f.options);
      });
  const auto sums = f.Reference(w, x, outputs, hidden, true);
  const auto b = bias.ToHost(), c = cos.ToHost(), s = sin.ToHost();
  const auto got_q = q.ToHost();
  std::vector<double> wanted;
  std::vector<BFloat16> got(static_cast<size_t>(rows) * outputs);
  for (size_t i = 0; i < f.some.size(); ++i) {
    const int row = f.some[i];
    for (int head = 0; head < heads + 2 * kv_heads; ++head) {
      const auto value = [&](int e) {
        return sums[i * outputs + head * dim + e] + static_cast<double>(b[head * dim + e]);
      };
      for (int e = 0; e < dim; ++e) {
        const double other = e < half ? -value(e + half) : value(e - half);
        const int at = row * half + e % half;
        const bool dropped = head >= heads && slots[row] < 0;
        wanted.push_back(dropped                   ? 0
                         : head < heads + kv_heads ? value(e) * c[at] + other * s[at]
                                                   : value(e));
        got[static_cast<size_t>(row) * outputs + head * dim + e] =
            dropped        ? __float2bfloat16(0)
            : head < heads ? got_q[(static_cast<size_t>(row) * heads + head) * dim + e]
                           : got_kv[slots[row] + (head - heads) * page + e];
      }
    }
  }
  f.ExpectClose(got, wanted, kBFloat16Limit, f.Name("qkv"));
  const size_t written = std::count_if(got_kv.begin(), got_kv.end(),
                                       [](BFloat16 v) { return !std::isnan(__bfloat162float(v)); });
  Expect(written == (static_cast<size_t>(rows) - 1) * 2 * kv_heads * dim,
         f.Name("qkv") + ": only the new positions' slots are written");
}

void LogitsMatch(const Fixture& f) {
  const int hidden = f.shape.hidden, vocab = f.shape.vocab;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(vocab) * hidden, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(f.rows) * hidden, 2);
  DeviceArray<float> logits(static_cast<size_t>(f.rows) * vocab);
  const auto got = RunThrice<float>(
      f, f.Name("logits"), &logits, [&] { logits.Poison(); },
      [&] {
        return HopperLogits({w.get(), x.get(), logits.get(), nullptr, f.rows, vocab, hidden,
                             f.Squares(), Fixture::kEpsilon},
                            f.Scratch(), f.options);
      });
  f.ExpectClose(got, f.Reference(w, x, vocab, hidden, true), kFloat32Limit, f.Name("logits"));
}

// Without scratch memory a row's bits do not depend on the number of rows.
void RowsStandAlone(const Shape& shape) {
  constexpr int kMost = 1000;
  const int hidden = shape.hidden, vocab = std::min(shape.vocab, 5000);
  const Fixture f(shape, kMost, false);
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(vocab) * hidden, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(kMost) * hidden, 2);
  DeviceArray<float> logits(static_cast<size_t>(kMost) * vocab);
  DeviceArray<BFloat16> gated(static_cast<size_t>(kMost) * shape.inner);
  const auto gate_up = RandomArray<BFloat16>(2ull * shape.inner * hidden, 3, 0.05f);
  std::vector<float> all;
  std::vector<BFloat16> all_gated;
  for (const int rows : {kMost, 9, 17, 64, 128, 200, 256, 500}) {
    logits.Poison();
    gated.Poison();
    const cudaError_t error = HopperLogits({w.get(), x.get(), logits.get(), nullptr, rows, vocab,
                                            hidden, f.Squares(), Fixture::kEpsilon},
                                           {}, f.options);
    Expect(error == cudaSuccess, std::string("launch: ") + cudaGetErrorString(error));
    const auto got = logits.ToHost();
    if (rows == kMost) all = got;
    Expect(std::memcmp(all.data(), got.data(), sizeof(float) * rows * vocab) == 0,
           std::string("the rows of a step stand alone: ") + shape.name + " rows " +
               std::to_string(rows));
    const cudaError_t gate_error =
        HopperGateUp({gate_up.get(), x.get(), gated.get(), rows, shape.inner, hidden, f.Squares(),
                      Fixture::kEpsilon},
                     {}, f.options);
    Expect(gate_error == cudaSuccess, std::string("launch: ") + cudaGetErrorString(gate_error));
    const auto got_gated = gated.ToHost();
    if (rows == kMost) all_gated = got_gated;
    Expect(
        std::memcmp(all_gated.data(), got_gated.data(), sizeof(BFloat16) * rows * shape.inner) == 0,
        std::string("the rows of a step stand alone, gate_up: ") + shape.name + " rows " +
            std::to_string(rows));
  }
}

// Nor does it matter which side of kWideRows the number of rows lies.
void WideRowsStandAlone(const Shape& shape) {
  constexpr int kMost = 2300;
  const int hidden = shape.hidden, inner = shape.inner;
  const Fixture f(shape, kMost, false);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(kMost) * hidden, 1);
  const auto gate_up = RandomArray<BFloat16>(2ull * inner * hidden, 2, 0.05f);
  const auto down = RandomArray<BFloat16>(static_cast<size_t>(hidden) * inner, 3, 0.05f);
  const auto norm = RandomArray<float>(hidden, 4);
  const auto before = RandomArray<float>(static_cast<size_t>(kMost) * hidden, 5);
  DeviceArray<BFloat16> gated(static_cast<size_t>(kMost) * inner);
  DeviceArray<BFloat16> scaled(before.size());
  DeviceArray<float> residual(before.size());
  DeviceArray<float> shares(static_cast<size_t>(HopperSquareParts(hidden)) * f.stride);
  std::vector<BFloat16> all_gated;
  std::vector<float> all_residual;
  for (const int rows : {kMost, 300, kWideRows - 1, kWideRows, 1061, 2100}) {
    gated.Poison();
    TANDEM_CUDA_CHECK(cudaMemcpy(residual.get(), before.get(), before.size() * sizeof(float),
                                 cudaMemcpyDeviceToDevice));
    cudaError_t error = HopperGateUp(
        {gate_up.get(), x.get(), gated.get(), rows, inner, hidden, f.Squares(), Fixture::kEpsilon},
        {}, f.options);
    Expect(error == cudaSuccess, std::string("launch: ") + cudaGetErrorString(error));
    error = HopperResidual({down.get(), gated.get(), residual.get(), norm.get(), scaled.get(),
                            shares.get(), f.stride, rows, hidden, inner},
                           {}, f.options);
    Expect(error == cudaSuccess, std::string("launch: ") + cudaGetErrorString(error));
    const auto got_gated = gated.ToHost();
    const auto got_residual = residual.ToHost();
    if (rows == kMost) {
      all_gated = got_gated;
      all_residual = got_residual;
    }
    const std::string name = std::string(shape.name) + " rows " + std::to_string(rows);
    const size_t count = static_cast<size_t>(rows);
    Expect(std::memcmp(all_gated.data(), got_gated.data(), count * inner * sizeof(BFloat16)) == 0,
           "many rows stand alone: gate_up " + name);
    Expect(
        std::memcmp(all_residual.data(), got_residual.data(), count * hidden * sizeof(float)) == 0,
        "many rows stand alone: residual " + name);
    // Of rows that are not there nothing is written.
    const bool untouched =
        std::all_of(got_gated.begin() + static_cast<int64_t>(count) * inner, got_gated.end(),
                    [](BFloat16 v) { return std::isnan(__bfloat162float(v)); });
    Expect(untouched, "only the rows are written: " + name);
  }
}

// `only`: the name of a shape, or null for all.
void RunAll(const char* only) {
  for (const Shape& shape : kShapes) {
    if (only != nullptr && std::strcmp(only, shape.name) != 0) continue;
    for (const int rows : {9, 16, 17, 64, 100, 129, 256, 300, 600, 1061, 2100, 4096}) {
      for (const bool cut : {false, true}) {
        const Fixture f(shape, rows, cut);
        GateUpMatches(f);
        ResidualMatches(f, shape.heads * shape.head_dim);
        ResidualMatches(f, shape.inner);
        QkvMatches(f);
        if (rows <= 300) LogitsMatch(f);
      }
    }
    RowsStandAlone(shape);
    WideRowsStandAlone(shape);
    std::printf("%s: %d failures so far\n", shape.name, failures);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace tandem::engine::cuda

// What ctest takes for "skipped".
constexpr int kSkipped = 77;

int main(int argc, char** argv) {
  int devices = 0;
  cudaDeviceProp properties;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
      cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("skipped: no CUDA device of compute capability 9\n");
    return kSkipped;
  }
  tandem::engine::cuda::RunAll(argc > 1 ? argv[1] : nullptr);
  TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  std::printf("%d failures\n", tandem::engine::cuda::failures);
  return tandem::engine::cuda::failures == 0 ? 0 : 1;
}
