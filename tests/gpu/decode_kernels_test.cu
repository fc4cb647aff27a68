// The decode kernels against plain ones in float64: one thread per output, the formulas of the
// headers read literally, on the same bfloat16 inputs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/step.h"
#include "engine/kernels/element.h"
#include "tests/gpu/device_array.h"

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

// ||got - wanted|| / ||wanted||; NaN anywhere gives NaN.
template <typename T, typename U>
double RelativeError(const std::vector<T>& got, const std::vector<U>& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double d = ToDouble(got[i]) - static_cast<double>(wanted[i]);
    difference += d * d;
    norm += static_cast<double>(wanted[i]) * static_cast<double>(wanted[i]);
  }
  return std::sqrt(difference / norm);
}

template <typename T, typename U>
void ExpectClose(const std::vector<T>& got, const std::vector<U>& wanted, double limit,
                 const std::string& what) {
  const double error = RelativeError(got, wanted);
  Expect(error <= limit, what + ": relative error " + std::to_string(error));
}

// Rounding of a result to bfloat16 costs 2^-9 at most, 0.29 of that on average.
constexpr double kBFloat16Limit = 2.5e-3;
constexpr double kFloat32Limit = 2e-5;

__global__ void PackAll(const float* values, size_t pairs, uint16_t* codes) {
  const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  if (i < pairs) codes[i] = PackE4M3(values[2 * i], values[2 * i + 1]);
}

// Of the pair (code, 255 - code).
__global__ void WidenAll(float2* floats, uint32_t* pairs) {
  const auto two = static_cast<uint16_t>(threadIdx.x | (255 - threadIdx.x) << 8);
  floats[threadIdx.x] = FloatsOf(two);
  pairs[threadIdx.x] = BFloat16sOf(two);
}

bool IsNanCode(uint32_t code) { return (code & 0x7f) == 0x7f; }
bool SameNumber(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof(a)) == 0;
}

// Conversions to and from e4m3 against element.h's.
void E4M3Matches() {
  std::vector<float> values = {NAN, -NAN, INFINITY, -INFINITY, 448, 464, 480, 1e30f, -1e30f, 0};
  for (uint32_t high = 0; high < 1 << 16; ++high) {  // every bfloat16, and what is next to it
    for (const uint32_t low : {0u, 1u, 0xffffu}) {
      const uint32_t bits = high << 16 | low;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      values.push_back(value);
    }
  }
  const DeviceArray<float> device_values(values);
  DeviceArray<uint16_t> codes(values.size() / 2);
  PackAll<<<static_cast<unsigned>(codes.size() / 128 + 1), 128>>>(device_values.get(), codes.size(),
                                                                  codes.get());
  const auto got = codes.ToHost();
  int different = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t code = got[i / 2] >> (i % 2 * 8) & 0xff, wanted = FloatToE4M3(values[i]);
    different += code != wanted && !(IsNanCode(code) && IsNanCode(wanted)) ? 1 : 0;
  }
  Expect(different == 0, "to e4m3: differ: " + std::to_string(different));
  DeviceArray<float2> floats(256);
  DeviceArray<uint32_t> pairs(256);
  WidenAll<<<1, 256>>>(floats.get(), pairs.get());
  const auto got_floats = floats.ToHost();
  const auto got_pairs = pairs.ToHost();
  for (size_t code = 0; code < 256; ++code) {
    const float low = E4M3ToFloat(static_cast<uint8_t>(code));
    const float high = E4M3ToFloat(static_cast<uint8_t>(255 - code));
    Expect(SameNumber(got_floats[code].x, low) && SameNumber(got_floats[code].y, high) &&
               SameNumber(BF16ToFloat(static_cast<uint16_t>(got_pairs[code])), low) &&
               SameNumber(BF16ToFloat(static_cast<uint16_t>(got_pairs[code] >> 16)), high),
           "from e4m3 " + std::to_string(code));
  }
}

// out[row][n] = sum_k w[n][k] x[row][k] / rms[row].
__global__ void ReferenceLinear(const BFloat16* w, const BFloat16* x, int outputs, int inputs,
                                const double* inverse_rms, double* out) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
  if (n >= outputs) return;
  double sum = 0;
  for (int k = 0; k < inputs; ++k) {
    sum += static_cast<double>(__bfloat162float(w[static_cast<int64_t>(n) * inputs + k])) *
           static_cast<double>(__bfloat162float(x[static_cast<int64_t>(row) * inputs + k]));
  }
  out[static_cast<int64_t>(row) * outputs + n] =
      inverse_rms == nullptr ? sum : sum * inverse_rms[row];
}

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, inner, vocab;
};
constexpr Shape kShapes[] = {
    // For tools that make everything a hundred times slower.
    {"small", 896, 14, 2, 64, 256, 1024},
    {"0.5b", 896, 14, 2, 64, 4864, 151936},
    {"7b", 3584, 28, 4, 128, 18944, 152064},
};

// What the tests of one shape share.
struct Fixture {
  Fixture(const Shape& s, int shared_bytes) : shape(s) {
    cudaDeviceProp properties;
    TANDEM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    options.multiprocessors = properties.multiProcessorCount;
    options.shared_bytes = shared_bytes;
    partial = DeviceArray<float>(SkinnyPartialFloats(options.multiprocessors));
    partial.Poison();
    counters = DeviceArray<uint32_t>(kSkinnyCounters);
    counters.Zero();
    turns = DeviceArray<uint32_t>(kTurns);
    turns.Zero();
  }
  SkinnyScratch Scratch() const { return {partial.get(), counters.get(), turns.get()}; }
  std::string Name(const char* test, int rows) const {
    return std::string(test) + " " + shape.name + " rows " + std::to_string(rows) + " shared " +
           std::to_string(options.shared_bytes);
  }
  void ExpectCountersZero(const std::string& name) const {
    const std::vector<uint32_t> values = counters.ToHost();
    Expect(std::all_of(values.begin(), values.end(), [](uint32_t v) { return v == 0; }),
           name + ": counters are left as they were found");
    const std::vector<uint32_t> taken = turns.ToHost();
    Expect(std::all_of(taken.begin(), taken.end(), [](uint32_t v) { return v == 0; }),
           name + ": all turns have ended");
  }

  Shape shape;
  LaunchOptions options;
  DeviceArray<float> partial;
  DeviceArray<uint32_t> counters, turns;
};

std::vector<double> Reference(const DeviceArray<BFloat16>& w, const DeviceArray<BFloat16>& x,
                              int rows, int outputs, int inputs,
                              const std::vector<double>& inverse_rms) {
  DeviceArray<double> out(static_cast<size_t>(rows) * outputs);
  DeviceArray<double> scales;
  if (!inverse_rms.empty()) scales = DeviceArray<double>(inverse_rms);
  ReferenceLinear<<<dim3((outputs + 127) / 128, rows), 128>>>(w.get(), x.get(), outputs, inputs,
                                                              scales.get(), out.get());
  TANDEM_CUDA_CHECK(cudaGetLastError());
  return out.ToHost();
}

// Shares of the sums of squares, and the 1 / rms they stand for.
struct Norm {
  Norm(int rows, int hidden) {
    shares = RandomArray<float>(kParts * kMaxSkinnyRows, 5, 10, 100);
    const std::vector<float> host = shares.ToHost();
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int part = 0; part < kParts; ++part) sum += host[part * kMaxSkinnyRows + row];
      inverse_rms.push_back(1 / std::sqrt(sum / hidden + kEpsilon));
    }
  }
  SquareSums Squares() const { return {shares.get(), kParts, kMaxSkinnyRows}; }
  static constexpr int kParts = 37;
  static constexpr float kEpsilon = 1e-6f;
  DeviceArray<float> shares;
  std::vector<double> inverse_rms;
};

void GateUpMatches(const Fixture& f, int rows) {
  const auto [hidden, inner] = std::pair(f.shape.hidden, f.shape.inner);
  const auto w = RandomArray<BFloat16>(2ull * inner * hidden, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(rows) * hidden, 2);
  const Norm norm(rows, hidden);
  DeviceArray<BFloat16> out(static_cast<size_t>(rows) * inner);
  out.Poison();
  TANDEM_CUDA_CHECK(SkinnyGateUp(
      {w.get(), x.get(), out.get(), rows, inner, hidden, norm.Squares(), Norm::kEpsilon},
      f.Scratch(), f.options));
  const auto sums = Reference(w, x, rows, 2 * inner, hidden, norm.inverse_rms);
  std::vector<double> wanted;
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < inner; ++i) {
      const double gate = sums[row * 2ull * inner + i], up = sums[row * 2ull * inner + inner + i];
      wanted.push_back(gate / (1 + std::exp(-gate)) * up);
    }
  }
  ExpectClose(out.ToHost(), wanted, kBFloat16Limit, f.Name("gate_up", rows));
  f.ExpectCountersZero(f.Name("gate_up", rows));
}

void ResidualMatches(const Fixture& f, int rows, int inputs) {
  const int outputs = f.shape.hidden;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(outputs) * inputs, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(rows) * inputs, 2);
  const auto g = RandomArray<float>(outputs, 3);
  auto residual = RandomArray<float>(static_cast<size_t>(rows) * outputs, 4);
  const auto before = residual.ToHost();
  const int parts = ResidualSquareParts(rows, outputs, inputs, f.options);
  DeviceArray<BFloat16> scaled(static_cast<size_t>(rows) * outputs);
  DeviceArray<float> shares(static_cast<size_t>(parts) * kMaxSkinnyRows);
  scaled.Poison();
  shares.Poison();
  TANDEM_CUDA_CHECK(SkinnyResidual({w.get(), x.get(), residual.get(), g.get(), scaled.get(),
                                    shares.get(), kMaxSkinnyRows, rows, outputs, inputs},
                                   f.Scratch(), f.options));
  std::vector<double> wanted = Reference(w, x, rows, outputs, inputs, {});
  std::vector<double> wanted_scaled, wanted_squares(rows), squares(rows);
  const auto weights = g.ToHost();
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] += before[i];
    wanted_scaled.push_back(wanted[i] * ToDouble(weights[i % outputs]));
    wanted_squares[i / outputs] += wanted[i] * wanted[i];
  }
  const auto got_shares = shares.ToHost();
  for (int part = 0; part < parts; ++part) {
    for (int row = 0; row < rows; ++row) squares[row] += got_shares[part * kMaxSkinnyRows + row];
  }
  const std::string name = f.Name("residual", rows) + " inputs " + std::to_string(inputs);
  ExpectClose(residual.ToHost(), wanted, kFloat32Limit, name);
  ExpectClose(scaled.ToHost(), wanted_scaled, kBFloat16Limit, name + " scaled");
  ExpectClose(std::vector<float>(squares.begin(), squares.end()), wanted_squares, kFloat32Limit,
              name + " squares");
  f.ExpectCountersZero(name);
}

void QkvMatches(const Fixture& f, int rows) {
  const auto [name, hidden, heads, kv_heads, dim, inner, vocab] = f.shape;
  constexpr int kBlockSize = 32;
  const int outputs = (heads + 2 * kv_heads) * dim, half = dim / 2, blocks = rows + 3;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(outputs) * hidden, 1, 0.05f);
  const auto bias = RandomArray<float>(outputs, 6);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(rows) * hidden, 2);
  const auto cos = RandomArray<float>(static_cast<size_t>(rows) * half, 7);
  const auto sin = RandomArray<float>(static_cast<size_t>(rows) * half, 8);
  const Norm norm(rows, hidden);
  const size_t page = static_cast<size_t>(kBlockSize) * dim;
  std::vector<int64_t> slots;
  for (int row = 0; row < rows; ++row) {
    slots.push_back(static_cast<int64_t>((rows + 1 - row) * 2 * kv_heads * page) +
                    row * 7 % kBlockSize * dim);
  }
  const DeviceArray<int64_t> device_slots(slots);
  DeviceArray<BFloat16> q(static_cast<size_t>(rows) * heads * dim);
  DeviceArray<BFloat16> kv(blocks * 2ull * kv_heads * page);
  q.Poison();
  kv.Poison();
  DeviceArray<uint8_t> fp8_kv(kv.size());
  fp8_kv.Poison();
  QkvArgs args = {w.get(),    bias.get(), x.get(),        q.get(),
                  kv.get(),   cos.get(),  sin.get(),      device_slots.get(),
                  rows,       heads,      kv_heads,       dim,
                  kBlockSize, hidden,     norm.Squares(), Norm::kEpsilon};
  TANDEM_CUDA_CHECK(SkinnyQkv(args, f.Scratch(), f.options));
  args.kv = fp8_kv.get();
  args.fp8_kv = true;
  TANDEM_CUDA_CHECK(SkinnyQkv(args, f.Scratch(), f.options));
  const auto sums = Reference(w, x, rows, outputs, hidden, norm.inverse_rms);
  const auto b = bias.ToHost();
  const auto c = cos.ToHost(), s = sin.ToHost();
  const auto got_q = q.ToHost(), got_kv = kv.ToHost();
  const auto codes = fp8_kv.ToHost();
  int wrong_codes = 0;
  std::vector<double> wanted;
  std::vector<BFloat16> got;
  for (int row = 0; row < rows; ++row) {
    for (int head = 0; head < heads + 2 * kv_heads; ++head) {
      const auto value = [&](int i) {
        return sums[static_cast<size_t>(row) * outputs + head * dim + i] +
               ToDouble(b[head * dim + i]);
      };
      for (int i = 0; i < dim; ++i) {
        const double other = i < half ? -value(i + half) : value(i - half);
        const int at = row * half + i % half;
        wanted.push_back(head < heads + kv_heads ? value(i) * c[at] + other * s[at] : value(i));
        got.push_back(head < heads ? got_q[(static_cast<size_t>(row) * heads + head) * dim + i]
                                   : got_kv[slots[row] + (head - heads) * page + i]);
        if (head < heads) continue;
        const uint8_t code = FloatToE4M3(static_cast<float>(wanted.back()));
        wrong_codes += codes[slots[row] + (head - heads) * page + i] != code ? 1 : 0;
      }
    }
  }
  ExpectClose(got, wanted, kBFloat16Limit, f.Name("qkv", rows));
  const size_t written = std::count_if(got_kv.begin(), got_kv.end(),
                                       [](BFloat16 v) { return !std::isnan(__bfloat162float(v)); });
  const size_t numbers = static_cast<size_t>(rows) * 2 * kv_heads * dim;
  Expect(written == numbers, f.Name("qkv", rows) + ": only the new positions' slots are written");
  // Sums in another order are now and then on the other side of where e4m3 rounds.
  Expect(wrong_codes <= static_cast<int>(numbers / 100),
         f.Name("qkv", rows) + ": wrong in e4m3: " + std::to_string(wrong_codes));
  const size_t coded =
      std::count_if(codes.begin(), codes.end(), [](uint8_t code) { return code != 0xff; });
  Expect(coded == numbers, f.Name("qkv", rows) + ": e4m3 goes to the new positions' slots alone");
  f.ExpectCountersZero(f.Name("qkv", rows));
}

void LogitsMatch(const Fixture& f, int rows) {
  const int hidden = f.shape.hidden, vocab = f.shape.vocab;
  const auto w = RandomArray<BFloat16>(static_cast<size_t>(vocab) * hidden, 1, 0.05f);
  const auto x = RandomArray<BFloat16>(static_cast<size_t>(rows) * hidden, 2);
  const Norm norm(rows, hidden);
  const int parts = LogitsBestParts(rows, vocab, hidden, f.options);
  DeviceArray<float> logits(static_cast<size_t>(rows) * vocab);
  DeviceArray<uint64_t> best(static_cast<size_t>(parts) * kMaxSkinnyRows);
  DeviceArray<int32_t> tokens(rows);
  logits.Poison();
  best.Poison();
  tokens.Poison();
  TANDEM_CUDA_CHECK(SkinnyLogits({w.get(), x.get(), logits.get(), best.get(), rows, vocab, hidden,
                                  norm.Squares(), Norm::kEpsilon},
                                 f.Scratch(), f.options));
  TANDEM_CUDA_CHECK(SelectGreedy(best.get(), parts, rows, tokens.get(), f.options));
  const auto got = logits.ToHost();
  ExpectClose(got, Reference(w, x, rows, vocab, hidden, norm.inverse_rms), kFloat32Limit,
              f.Name("logits", rows));
  const auto chosen = tokens.ToHost();
  for (int row = 0; row < rows; ++row) {
    const auto begin = got.begin() + static_cast<ptrdiff_t>(row) * vocab;
    Expect(chosen[row] == std::max_element(begin, begin + vocab) - begin,
           f.Name("greedy", rows) + " row " + std::to_string(row));
  }
}

// One thread block per (row, head); one thread per dimension, scores computed by all.
__global__ void ReferenceAttention(DecodeAttentionArgs a, double* out) {
  extern __shared__ double scores[];
  const DecodeItem item = a.items[blockIdx.x];
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), length = item.length;
  if (length == 0) return;
  const auto element = [&](int position, int value, int d) {
    const int64_t block = a.blocks[item.first_block + position / a.block_size];
    const int64_t page = (block * 2 + value) * a.kv_heads + kv_head;
    const int64_t at = (page * a.block_size + position % a.block_size) * a.head_dim + d;
    return static_cast<double>(a.fp8_kv ? ToFloat(static_cast<const E4M3*>(a.kv)[at])
                                        : ToFloat(static_cast<const BFloat16*>(a.kv)[at]));
  };
  const BFloat16* q = a.q + (static_cast<int64_t>(item.row) * a.heads + head) * a.head_dim;
  for (int p = threadIdx.x; p < length; p += blockDim.x) {
    double sum = 0;
    for (int d = 0; d < a.head_dim; ++d) {
      sum += static_cast<double>(__bfloat162float(q[d])) * element(p, 0, d);
    }
    scores[p] = sum * a.scale;
  }
  __syncthreads();
  double maximum = -1e300, total = 0, value = 0;
  for (int p = 0; p < length; ++p) maximum = fmax(maximum, scores[p]);
  for (int p = 0; p < length; ++p) {
    const double weight = exp(scores[p] - maximum);
    total += weight;
    value += weight * element(p, 1, threadIdx.x);
  }
  out[(static_cast<int64_t>(item.row) * a.heads + head) * a.head_dim + threadIdx.x] = value / total;
}

// A length of 0 stands for an item that the kernel must leave alone.
void AttentionMatches(const Fixture& f, const std::vector<int>& lengths, int block_size,
                      bool fp8_kv) {
  const auto [name, hidden, heads, kv_heads, dim, inner, vocab] = f.shape;
  const int num_items = static_cast<int>(lengths.size());
  const int longest = *std::max_element(lengths.begin(), lengths.end());
  // Items lie in the rows in reverse. Blocks are handed out in a scattered order; what no position
  // uses holds NaN.
  std::vector<DecodeItem> items;
  int tiles = 0, blocks = 0;
  for (int i = 0; i < num_items; ++i) {
    items.push_back({tiles, lengths[i], blocks, num_items - 1 - i});
    tiles += (lengths[i] + kAttentionTile - 1) / kAttentionTile;
    blocks += (lengths[i] + block_size - 1) / block_size;
  }
  items.push_back({tiles, 0, 0, 0});
  std::vector<int32_t> order(static_cast<size_t>(blocks));
  for (int i = 0; i < blocks; ++i) {
    order[i] = static_cast<int32_t>(static_cast<int64_t>(i) * 7919 % blocks);
  }
  if (blocks % 7919 == 0) std::iota(order.begin(), order.end(), 0);
  const size_t page = static_cast<size_t>(block_size) * dim;
  const auto random = RandomArray<BFloat16>(blocks * 2ull * kv_heads * page, 11);
  auto pages = random.ToHost();
  for (int i = 0; i < num_items; ++i) {
    for (int p = lengths[i]; p % block_size != 0; ++p) {
      const size_t block = static_cast<size_t>(order[items[i].first_block + p / block_size]);
      for (size_t part = 0; part < 2ull * kv_heads; ++part) {
        const size_t at = (block * 2 * kv_heads + part) * page + p % block_size * dim;
        for (int d = 0; d < dim; ++d) pages[at + d] = __float2bfloat16(NAN);
      }
    }
  }
  std::vector<uint8_t> codes;
  for (const BFloat16 number : pages) codes.push_back(FloatToE4M3(__bfloat162float(number)));
  const DeviceArray<BFloat16> kv(pages);
  const DeviceArray<uint8_t> coded_kv(codes);
  const auto q = RandomArray<BFloat16>(static_cast<size_t>(num_items) * heads * dim, 12, 4);
  const DeviceArray<int32_t> device_blocks(order);
  const DeviceArray<DecodeItem> device_items(items);
  DeviceArray<BFloat16> out(q.size());
  DeviceArray<uint64_t> parts(DecodeAttentionParts(dim, f.options.multiprocessors));
  DeviceArray<uint32_t> launches(static_cast<size_t>(f.options.multiprocessors));
  parts.Poison();
  launches.Zero();
  const void* const kv_of = fp8_kv ? static_cast<const void*>(coded_kv.get()) : kv.get();
  const DecodeAttentionArgs args = {q.get(),
                                    kv_of,
                                    device_items.get(),
                                    device_blocks.get(),
                                    out.get(),
                                    num_items,
                                    heads,
                                    kv_heads,
                                    dim,
                                    block_size,
                                    1 / std::sqrt(static_cast<float>(dim)),
                                    fp8_kv};
  // The second launch finds the first one's parts in the scratch memory.
  for (int launch = 0; launch < 2; ++launch) {
    out.Poison();
    TANDEM_CUDA_CHECK(
        DecodeAttention(args, {parts.get(), launches.get(), f.turns.get()}, f.options));
  }
  DeviceArray<double> wanted(q.size());
  wanted.Zero();
  const int shared = longest * 8;
  TANDEM_CUDA_CHECK(cudaFuncSetAttribute(ReferenceAttention,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  ReferenceAttention<<<dim3(num_items, heads), dim, shared>>>(args, wanted.get());
  TANDEM_CUDA_CHECK(cudaGetLastError());
  const std::string what = f.Name("attention", num_items) + " longest " + std::to_string(longest) +
                           " block size " + std::to_string(block_size) + (fp8_kv ? " e4m3" : "");
  const std::vector<BFloat16> got = out.ToHost();
  const std::vector<double> values = wanted.ToHost();
  const size_t width = static_cast<size_t>(heads) * dim;
  for (int i = 0; i < num_items; ++i) {
    const auto begin = static_cast<ptrdiff_t>(static_cast<size_t>(items[i].row) * width);
    const auto end = begin + static_cast<ptrdiff_t>(width);
    const std::vector<BFloat16> mine(got.begin() + begin, got.begin() + end);
    if (lengths[i] == 0) {
      Expect(std::all_of(mine.begin(), mine.end(),
                         [](BFloat16 v) { return std::isnan(__bfloat162float(v)); }),
             what + ": another's row is left alone");
      continue;
    }
    // Probabilities are rounded to bfloat16, or to halves, before they meet the values.
    ExpectClose(mine, std::vector<double>(values.begin() + begin, values.begin() + end),
                2 * kBFloat16Limit, what + " item " + std::to_string(i));
  }
  const auto counted = launches.ToHost();
  Expect(std::all_of(counted.begin(), counted.end(), [](uint32_t v) { return v == 2; }),
         what + ": every thread block counts the launches");
}

void PrepareStepMatches(const Fixture& f) {
  const int hidden = f.shape.hidden, dim = f.shape.head_dim, kv_heads = f.shape.kv_heads;
  constexpr int kBlockSize = 16, kVocab = 1000;
  // Items of one row, one of three rows, one that pads, and one whose token the step before drew.
  const std::vector<int32_t> starts = {0, 15, 16, 30, -1, 2047, 131071};
  const std::vector<int32_t> run = {1, 1, 1, 3, 1, 1, 1}, drawn = {7, 999, 8};
  const std::vector<int32_t> tokens = {0, 999, 5, 5, 6, 7, 123456789, -2, 123};
  const int items = static_cast<int>(starts.size()), rows = static_cast<int>(tokens.size());
  std::vector<int32_t> positions, first_rows = {0}, first_blocks = {0}, blocks;
  std::vector<int> item_of;
  for (int i = 0; i < items; ++i) {
    for (int r = 0; r < run[i]; ++r) {
      positions.push_back(starts[i] < 0 ? -1 : starts[i] + r);
      item_of.push_back(i);
    }
    first_rows.push_back(first_rows.back() + run[i]);
    if (starts[i] >= 0) {
      for (int p = 0; p < starts[i] + run[i]; p += kBlockSize) {
        blocks.push_back(static_cast<int32_t>(blocks.size() * 31 % 65536));
      }
    }
    first_blocks.push_back(static_cast<int32_t>(blocks.size()));
  }
  std::vector<float> frequencies;
  for (int i = 0; i < dim / 2; ++i) {
    frequencies.push_back(static_cast<float>(std::pow(1e6, -2.0 * i / dim)));
  }
  const DeviceArray<int32_t> d_tokens(tokens), d_positions(positions), d_first_rows(first_rows),
      d_starts(starts), d_first_blocks(first_blocks), d_blocks(blocks), d_drawn(drawn);
  const DeviceArray<float> d_frequencies(frequencies);
  const auto embedding = RandomArray<BFloat16>(static_cast<size_t>(kVocab) * hidden, 1);
  const auto g = RandomArray<float>(hidden, 2);
  DeviceArray<float> residual(static_cast<size_t>(rows) * hidden), shares(rows);
  DeviceArray<BFloat16> scaled(static_cast<size_t>(rows) * hidden);
  DeviceArray<float> cos(static_cast<size_t>(rows) * dim / 2), sin(cos.size());
  DeviceArray<int64_t> slots(rows);
  DeviceArray<DecodeItem> decode_items(items + 1);
  residual.Poison();
  scaled.Poison();
  shares.Poison();
  decode_items.Poison();
  TANDEM_CUDA_CHECK(PrepareStep({d_tokens.get(),
                                 d_positions.get(),
                                 d_first_rows.get(),
                                 d_starts.get(),
                                 d_first_blocks.get(),
                                 d_blocks.get(),
                                 d_drawn.get(),
                                 embedding.get(),
                                 g.get(),
                                 d_frequencies.get(),
                                 residual.get(),
                                 scaled.get(),
                                 shares.get(),
                                 cos.get(),
                                 sin.get(),
                                 slots.get(),
                                 decode_items.get(),
                                 rows,
                                 items,
                                 hidden,
                                 kv_heads,
                                 dim,
                                 kBlockSize,
                                 1.25f},
                                f.options));
  const auto e = embedding.ToHost();
  const auto weights = g.ToHost();
  std::vector<double> wanted, wanted_scaled, wanted_cos, wanted_sin, wanted_squares(rows);
  const auto got_slots = slots.ToHost();
  for (int row = 0; row < rows; ++row) {
    const int item = item_of[row];
    const bool exists = starts[item] >= 0;
    const int token = tokens[row] == -2 ? drawn[1] : tokens[row];
    for (int i = 0; i < hidden; ++i) {
      const double value = exists ? ToDouble(e[static_cast<size_t>(token) * hidden + i]) : 0;
      wanted.push_back(value);
      wanted_scaled.push_back(value * ToDouble(weights[i]));
      wanted_squares[row] += value * value;
    }
    const int position = exists ? positions[row] : 0;
    for (int i = 0; i < dim / 2; ++i) {
      const double angle = static_cast<float>(position) * frequencies[i];
      wanted_cos.push_back(std::cos(angle) * 1.25);
      wanted_sin.push_back(std::sin(angle) * 1.25);
    }
    int64_t slot = -1;
    if (exists) {
      const int64_t block = blocks[first_blocks[item] + position / kBlockSize];
      slot = (block * 2 * kv_heads * kBlockSize + position % kBlockSize) * dim;
    }
    Expect(got_slots[row] == slot, "prepare_step slot of row " + std::to_string(row));
  }
  ExpectClose(residual.ToHost(), wanted, 0, "prepare_step residual");
  ExpectClose(scaled.ToHost(), wanted_scaled, kBFloat16Limit, "prepare_step scaled");
  ExpectClose(cos.ToHost(), wanted_cos, 1e-6, "prepare_step cos");
  ExpectClose(sin.ToHost(), wanted_sin, 1e-6, "prepare_step sin");
  ExpectClose(shares.ToHost(), wanted_squares, kFloat32Limit, "prepare_step squares");
  const auto got_items = decode_items.ToHost();
  int tiles = 0;
  for (int i = 0; i < items; ++i) {
    const int length = run[i] == 1 && starts[i] >= 0 ? starts[i] + 1 : 0;
    const DecodeItem& got = got_items[i];
    Expect(got.first_tile == tiles && got.length == length && got.first_block == first_blocks[i] &&
               got.row == first_rows[i],
           "prepare_step item " + std::to_string(i));
    tiles += (length + kAttentionTile - 1) / kAttentionTile;
  }
  Expect(got_items[items].first_tile == tiles, "prepare_step tiles");
}

std::vector<int> RandomLengths(int rows, int longest) {
  std::vector<int> lengths;
  for (int i = 0; i < rows; ++i) {
    lengths.push_back(1 + static_cast<int>((RandomAt(77, i) * 0.5f + 0.5f) * (longest - 1)));
  }
  return lengths;
}

// Every product has a tile that fits, on the devices we know; needs no device.
void TilesFit() {
  for (const int shared_kb : {99, 163, 227}) {
    for (int rows = 1; rows <= kMaxSkinnyRows; ++rows) {
      for (const auto product : {SkinnyProduct::kQkv, SkinnyProduct::kGateUp,
                                 SkinnyProduct::kResidual, SkinnyProduct::kLogits}) {
        const SkinnyTileShape tile = SkinnyTileOf(product, rows, shared_kb << 10);
        const std::string name =
            "tile of " + std::to_string(rows) + " rows, " + std::to_string(shared_kb) + " KB";
        Expect(tile.rows >= rows && tile.shared_bytes <= shared_kb << 10, name);
        Expect((tile.stages - 1) * tile.height * tile.depth * 2 >= 24 << 10,
               name + ": enough weights on their way");
      }
    }
    LaunchOptions options;
    options.multiprocessors = 114;
    options.shared_bytes = shared_kb << 10;
    for (const Shape& shape : kShapes) {
      Expect(SupportsDecodeAttention(64, shape.heads, shape.kv_heads, shape.head_dim, 16, options),
             "attention of " + std::string(shape.name) + ", " + std::to_string(shared_kb) + " KB");
    }
  }
}

// `only`: the name of a shape, or null for all.
void RunAll(const char* only) {
  E4M3Matches();
  int device_bytes = 0;
  TANDEM_CUDA_CHECK(
      cudaDeviceGetAttribute(&device_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  for (const Shape& shape : kShapes) {
    if (only != nullptr && std::strcmp(only, shape.name) != 0) continue;
    // The device's own, and the short rings of sm_89.
    for (const int shared_bytes : {device_bytes, 99 << 10}) {
      const Fixture f(shape, shared_bytes);
      for (const int rows : {1, 2, 8, 9, 16, 17, 32, 33, 64}) {
        GateUpMatches(f, rows);
        ResidualMatches(f, rows, shape.heads * shape.head_dim);
        ResidualMatches(f, rows, shape.inner);
        QkvMatches(f, rows);
      }
      for (const int rows : {1, 7, 16, 32, 64}) LogitsMatch(f, rows);
      PrepareStepMatches(f);
      for (const bool fp8_kv : {false, true}) {
        AttentionMatches(f, {1}, 16, fp8_kv);
        AttentionMatches(f, {0, 5, 40, 1, 16, 0, 0, 17, 300, 64, 0}, 64, fp8_kv);
        if (std::strcmp(shape.name, "small") == 0) continue;
        AttentionMatches(f, {2048}, 16, fp8_kv);
        AttentionMatches(f, {20000}, 32, fp8_kv);
        AttentionMatches(f, {0, 5, 2048, 1, 16, 0, 0, 17, 777, 4096, 0}, 64, fp8_kv);
        AttentionMatches(f, RandomLengths(64, 2048), 16, fp8_kv);
        AttentionMatches(f, RandomLengths(256, 600), 16, fp8_kv);
      }
    }
  }
}

}  // namespace
}  // namespace tandem::engine::cuda

// What ctest takes for "skipped".
constexpr int kSkipped = 77;

int main(int argc, char** argv) {
  tandem::engine::cuda::TilesFit();
  if (tandem::engine::cuda::failures != 0) return 1;
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
