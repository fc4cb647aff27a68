// Every op on the GPU beside the same op on the CPU in float32, on the same inputs: each op's
// result on the GPU is what the next one is given on both sides.
#include "engine/kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "engine/device/cpu/cpu_device.h"
#include "engine/device/cuda/cuda_device.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/kernels/rope.h"
#include "tests/support/paths.h"

namespace tandem::engine::cuda {
namespace {

// Relative L2 of a row: what rounding the inputs of a product and its result to bfloat16 gives,
// with some room.
constexpr double kTolerance = 1e-2;
constexpr float kEpsilon = 1e-6f;

struct ItemRun {
  int start;  // -1: padding
  int rows;
};

struct Case {
  const char* name;
  int heads, kv_heads, head_dim, hidden, inner, vocab, block_size;
  int biases;  // 0: none, 1: of queries, keys and values, 2: of the other projections too
  bool qk_norm;
  Element embedding;
  std::vector<ItemRun> runs;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// The kernels that may be used, and the element of pages on both sides.
struct Variant {
  const char* name;
  CudaOpsOptions options;
  bool fp8_kv = false;
};
void PrintTo(const Variant& variant, std::ostream* out) { *out << variant.name; }

struct Sizes {
  size_t q, kv, all;
  explicit Sizes(const Case& c)
      : q(static_cast<size_t>(c.heads * c.head_dim)),
        kv(static_cast<size_t>(c.kv_heads * c.head_dim)),
        all(q + 2 * kv) {}
};

size_t Size(int value) { return static_cast<size_t>(value); }

// One side of the comparison. Values are float32 on the host; on the device activations and KV are
// of the side's own element.
class Side {
 public:
  Side(Device* device, std::unique_ptr<Ops> ops, Element element)
      : device_(device), ops_(std::move(ops)), stream_(device->NewStream()), element_(element) {}

  Ops& ops() { return *ops_; }
  Stream* stream() { return stream_.get(); }

  template <typename T>
  T* Put(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    Buffer buffer = device_->Allocate(std::max<size_t>(bytes, 64)).value();
    stream_->CopyToDevice(buffer.data(), values.data(), bytes);
    stream_->Synchronize();
    buffers_.push_back(std::move(buffer));
    return buffers_.back().as<T>();
  }
  template <typename T>
  std::vector<T> Get(const void* from, size_t count) {
    std::vector<T> values(count);
    stream_->CopyToHost(values.data(), from, count * sizeof(T));
    stream_->Synchronize();
    return values;
  }
  // Values of the side's element.
  void* PutElements(const std::vector<float>& values) {
    if (element_ == Element::kFloat32) return Put(values);
    std::vector<uint16_t> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) rounded[i] = FloatToBF16(values[i]);
    return Put(rounded);
  }
  std::vector<float> GetElements(const void* from, size_t count) {
    if (element_ == Element::kFloat32) return Get<float>(from, count);
    const std::vector<uint16_t> bits = Get<uint16_t>(from, count);
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = BF16ToFloat(bits[i]);
    return values;
  }
  // A pool's pages: of the side's element, or e4m3.
  std::byte* PutPages(const std::vector<float>& values, bool fp8) {
    if (!fp8) return static_cast<std::byte*>(PutElements(values));
    std::vector<std::byte> codes;
    for (const float value : values) codes.push_back(std::byte{FloatToE4M3(value)});
    return Put(codes);
  }
  std::vector<float> GetPages(const void* from, size_t count, bool fp8) {
    if (!fp8) return GetElements(from, count);
    std::vector<float> values;
    for (const uint8_t code : Get<uint8_t>(from, count)) values.push_back(E4M3ToFloat(code));
    return values;
  }
  Projection PutProjection(const std::vector<uint16_t>& weight, size_t n, size_t k,
                           const std::vector<float>& bias) {
    buffers_.push_back(device_->Allocate(ops_->PackedWeightBytes(n, k)).value());
    void* packed = buffers_.back().data();
    const size_t half = n / 2;  // in two parts, as query, key and value weights come
    ops_->PackWeightRows(weight.data(), Element::kBFloat16, half, k, 0, packed, stream_.get());
    ops_->PackWeightRows(weight.data() + half * k, Element::kBFloat16, n - half, k, half, packed,
                         stream_.get());
    stream_->Synchronize();
    return {{element_, n, k, packed}, bias.empty() ? nullptr : Put(bias)};
  }

 private:
  Device* device_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Stream> stream_;
  const Element element_;
  std::vector<Buffer> buffers_;
};

class CudaOpsTest : public ::testing::TestWithParam<std::tuple<Case, Variant>> {
 protected:
  void SetUp() override {
    auto device = CudaDevice::Open(0);
    if (!device.ok()) GTEST_SKIP() << device.status().ToString();
    cuda_device_ = *std::move(device);
    MakeSides();
    MakeBatch();
  }

  void MakeSides() {
    OpsShape shape;
    shape.max_rows = 300;
    shape.max_items = 80;
    shape.max_logit_rows = 8;
    shape.hidden = Size(case_.hidden);
    shape.q_width = sizes_.q;
    shape.kv_width = sizes_.kv;
    shape.head_dim = Size(case_.head_dim);
    shape.inner = Size(case_.inner);
    shape.vocab = Size(case_.vocab);
    shape.qk_norm = case_.qk_norm;
    shape.output_bias = shape.mlp_bias = case_.biases > 1;
    shape.fp8_kv = fp8_kv_;
    shape.element = Element::kFloat32;
    Buffer scratch = cpu_device_.Allocate(CpuOps::ScratchBytes(shape)).value();
    cpu_ = std::make_unique<Side>(
        &cpu_device_, std::make_unique<CpuOps>(shape, std::move(scratch), &cpu_device_.threads()),
        Element::kFloat32);
    shape.element = Element::kBFloat16;
    auto ops = MakeCudaOps(shape, cuda_device_.get(), std::get<1>(GetParam()).options);
    ASSERT_OK(ops);
    EXPECT_EQ((*ops)->activation(), Element::kBFloat16);
    cuda_ = std::make_unique<Side>(cuda_device_.get(), *std::move(ops), Element::kBFloat16);
  }

  // --- inputs ---
  std::vector<float> Random(size_t count, float scale = 1, float offset = 0) {
    std::normal_distribution<float> normal(offset, scale);
    std::vector<float> values(count);
    for (float& value : values) value = BF16ToFloat(FloatToBF16(normal(random_)));
    return values;
  }
  // On both sides.
  void PutProjections(size_t n, size_t k, bool bias, Projection* cpu, Projection* cuda) {
    const std::vector<float> values = Random(n * k, 1 / std::sqrt(static_cast<float>(k)));
    std::vector<uint16_t> bits(values.size());
    for (size_t i = 0; i < values.size(); ++i) bits[i] = FloatToBF16(values[i]);
    const std::vector<float> bias_values = bias ? Random(n) : std::vector<float>();
    *cpu = cpu_->PutProjection(bits, n, k, bias_values);
    *cuda = cuda_->PutProjection(bits, n, k, bias_values);
  }

  // The CPU's batch has no padding, which comes last.
  void MakeBatch() {
    for (const ItemRun& run : case_.runs) {
      const bool padding = run.start < 0;
      for (int i = 0; i < run.rows; ++i) {
        token_ids_.push_back(padding ? 0 : static_cast<int32_t>(random_() % Size(case_.vocab)));
        positions_.push_back(padding ? 0 : run.start + i);
      }
      if (!padding && run.start > 0) token_ids_.back() = PendingId(1);
      starts_.push_back(run.start);
      first_rows_.push_back(static_cast<int32_t>(token_ids_.size()));
      const int length = padding ? 0 : run.start + run.rows;
      const int blocks = (length + case_.block_size - 1) / case_.block_size;
      first_blocks_.push_back(first_blocks_.back() + blocks);
      if (padding) continue;
      host_.num_rows += run.rows;
      ++host_.num_items;
      host_.max_item_rows = std::max(host_.max_item_rows, run.rows);
      host_.max_length = std::max(host_.max_length, length);
    }
    num_blocks_ = first_blocks_.back() + 2;
    blocks_.resize(Size(num_blocks_));
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::shuffle(blocks_.begin(), blocks_.end(), random_);
    host_.token_ids = token_ids_.data();
    host_.positions = positions_.data();
    host_.first_rows = first_rows_.data();
    host_.starts = starts_.data();
    host_.first_blocks = first_blocks_.data();
    host_.blocks = blocks_.data();
    cuda_host_ = host_;
    cuda_host_.num_rows = static_cast<int>(token_ids_.size());
    cuda_host_.num_items = static_cast<int>(starts_.size());
    cuda_batch_ = cuda_host_;
    cuda_batch_.token_ids = cuda_->Put(token_ids_);
    cuda_batch_.positions = cuda_->Put(positions_);
    cuda_batch_.first_rows = cuda_->Put(first_rows_);
    cuda_batch_.starts = cuda_->Put(starts_);
    cuda_batch_.first_blocks = cuda_->Put(first_blocks_);
    cuda_batch_.blocks = cuda_->Put(blocks_);
    rows_ = Size(host_.num_rows);
    all_rows_ = Size(cuda_host_.num_rows);
  }

  size_t PoolElements() const { return Size(num_blocks_) * 2 * sizes_.kv * Size(case_.block_size); }
  // Positions before each run hold numbers, all else NaN: nobody may read it.
  std::vector<float> MakePool() {
    std::vector<float> pool(PoolElements(), std::nanf(""));
    const size_t block_size = Size(case_.block_size), head_dim = Size(case_.head_dim);
    for (size_t item = 0; item < Size(host_.num_items); ++item) {
      for (size_t p = 0; p < Size(starts_[item]); ++p) {
        const size_t block = Size(blocks_[Size(first_blocks_[item]) + p / block_size]);
        for (size_t head = 0; head < 2 * Size(case_.kv_heads); ++head) {
          const std::vector<float> values = Random(head_dim);
          std::copy(values.begin(), values.end(),
                    pool.begin() +
                        static_cast<long>(((block * 2 * Size(case_.kv_heads) + head) * block_size +
                                           p % block_size) *
                                          head_dim));
        }
      }
    }
    return pool;
  }

  // Rows of both within the tolerance; says where the largest difference is.
  void Compare(const char* what, const std::vector<float>& got, const std::vector<float>& want,
               size_t rows, size_t width) {
    int reports = 0;
    for (size_t row = 0; row < rows && reports < 4; ++row) {
      double difference = 0, norm = 0, largest = -1;
      size_t at = 0;
      for (size_t i = row * width; i < (row + 1) * width; ++i) {
        const double d = std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
        difference += d * d;
        norm += static_cast<double>(want[i]) * static_cast<double>(want[i]);
        if (!(d <= largest)) {
          largest = d;
          at = i;
        }
      }
      const double relative = std::sqrt(difference / std::max(norm, 1e-30));
      worst_ = std::isnan(relative) ? relative : std::max(worst_, relative);
      if (relative <= kTolerance) continue;
      ++reports;
      ADD_FAILURE() << fmt::format("{}: row {} of {}: relative L2 {}; column {} of {}: {} for {}",
                                   what, row, rows, relative, at % width, width, got[at], want[at]);
    }
    fmt::print("  {:<20} worst relative L2 {:.2e}\n", what, worst_);
    worst_ = 0;
  }

  // As Compare. Numbers that are nearly the same may round to neighbours, an eighth apart.
  void CompareRounded(const char* what, const std::vector<float>& got,
                      const std::vector<float>& want, size_t rows, size_t width) {
    int wrong = 0, different = 0;
    for (size_t row = 0; row < rows; ++row) {
      double norm = 0;
      for (size_t i = row * width; i < (row + 1) * width; ++i) norm += std::pow(want[i], 2);
      const double room = 2 * kTolerance * std::sqrt(norm / static_cast<double>(width));
      for (size_t i = row * width; i < (row + 1) * width; ++i) {
        const double size = std::max(std::abs(got[i]), std::abs(want[i]));
        different += got[i] != want[i];
        wrong += !(std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i])) <=
                   size / 8 + room);
      }
    }
    fmt::print("  {:<20} {} of {} rounded to a neighbour\n", what, different, rows * width);
    EXPECT_EQ(wrong, 0) << what;
    EXPECT_LT(different, static_cast<double>(rows * width) / 8) << what;
  }

  const Case& case_ = std::get<0>(GetParam());
  const bool fp8_kv_ = std::get<1>(GetParam()).fp8_kv;
  const Sizes sizes_{std::get<0>(GetParam())};
  std::mt19937 random_{7};
  CpuDevice cpu_device_{{.num_threads = 2}};
  std::unique_ptr<CudaDevice> cuda_device_;
  std::unique_ptr<Side> cpu_, cuda_;
  std::vector<int32_t> token_ids_, positions_, first_rows_ = {0}, starts_, first_blocks_ = {0},
                                               blocks_;
  RaggedBatch host_, cuda_host_, cuda_batch_;
  int num_blocks_ = 0;
  size_t rows_ = 0, all_rows_ = 0;  // without and with padding
  double worst_ = 0;
};

TEST_P(CudaOpsTest, AStep) {
  fmt::print("{} {}\n", case_.name, std::get<1>(GetParam()).name);
  const Case& c = case_;
  const size_t hidden = Size(c.hidden), inner = Size(c.inner), vocab = Size(c.vocab);
  const std::vector<float> pool = MakePool();
  const KvPages cpu_pages{cpu_->PutPages(pool, fp8_kv_),
                          fp8_kv_ ? Element::kFloat8E4M3 : Element::kFloat32,
                          c.kv_heads,
                          c.head_dim,
                          c.block_size,
                          num_blocks_};
  const KvPages cuda_pages{cuda_->PutPages(pool, fp8_kv_),
                           fp8_kv_ ? Element::kFloat8E4M3 : Element::kBFloat16,
                           c.kv_heads,
                           c.head_dim,
                           c.block_size,
                           num_blocks_};
  const std::vector<float> norm = Random(hidden, 0.3f, 1), next_norm = Random(hidden, 0.3f, 1);
  const std::vector<float> frequencies = RopeFrequencies(c.head_dim, 10000);
  const std::vector<int32_t> drawn = {3, 5, 1};

  // The embedding, in the element that the checkpoint has it in.
  const std::vector<float> embedding = Random(vocab * hidden, 2);
  std::vector<uint16_t> embedding_bits(embedding.size());
  for (size_t i = 0; i < embedding.size(); ++i) embedding_bits[i] = FloatToBF16(embedding[i]);
  const bool wide = c.embedding == Element::kFloat32;
  BeginArgs begin;
  begin.batch = &host_;
  begin.host = &host_;
  begin.embedding_element = c.embedding;
  begin.rope_scale = 1.25f;
  begin.drawn = cpu_->Put(drawn);
  begin.embedding = wide ? static_cast<void*>(cpu_->Put(embedding)) : cpu_->Put(embedding_bits);
  begin.frequencies = cpu_->Put(frequencies);
  begin.pages = cpu_pages;
  begin.next_norm = {cpu_->Put(norm), kEpsilon};
  begin.hidden = cpu_->Put(std::vector<float>(rows_ * hidden));
  cpu_->ops().Begin(begin, cpu_->stream());
  float* cpu_hidden = begin.hidden;
  begin.batch = &cuda_batch_;
  begin.host = &cuda_host_;
  begin.drawn = cuda_->Put(drawn);
  begin.embedding = wide ? static_cast<void*>(cuda_->Put(embedding)) : cuda_->Put(embedding_bits);
  begin.frequencies = cuda_->Put(frequencies);
  begin.pages = cuda_pages;
  begin.next_norm = {cuda_->Put(norm), kEpsilon};
  begin.hidden = cuda_->Put(std::vector<float>(all_rows_ * hidden, std::nanf("")));
  cuda_->ops().Begin(begin, cuda_->stream());
  float* cuda_hidden = begin.hidden;
  EXPECT_EQ(cuda_->Get<float>(cuda_hidden, rows_ * hidden),
            cpu_->Get<float>(cpu_hidden, rows_ * hidden));

  engine::QkvArgs qkv, cuda_qkv;
  PutProjections(sizes_.all, hidden, c.biases > 0, &qkv.projection, &cuda_qkv.projection);
  const std::vector<float> q_norm = Random(Size(c.head_dim), 0.3f, 1);
  const std::vector<float> k_norm = Random(Size(c.head_dim), 0.3f, 1);
  qkv.heads = cuda_qkv.heads = c.heads;
  qkv.batch = &host_;
  qkv.hidden = cpu_hidden;
  qkv.norm = {cpu_->Put(norm), kEpsilon};
  qkv.q_norm = c.qk_norm ? cpu_->Put(q_norm) : nullptr;
  qkv.k_norm = c.qk_norm ? cpu_->Put(k_norm) : nullptr;
  qkv.pages = cpu_pages;
  qkv.queries = cpu_->Put(std::vector<float>(rows_ * sizes_.all));
  cpu_->ops().Qkv(qkv, cpu_->stream());
  cuda_qkv.batch = &cuda_batch_;
  cuda_qkv.hidden = cuda_hidden;
  cuda_qkv.norm = {cuda_->Put(norm), kEpsilon};
  cuda_qkv.q_norm = c.qk_norm ? cuda_->Put(q_norm) : nullptr;
  cuda_qkv.k_norm = c.qk_norm ? cuda_->Put(k_norm) : nullptr;
  cuda_qkv.pages = cuda_pages;
  cuda_qkv.queries = cuda_->PutElements(std::vector<float>(all_rows_ * sizes_.all, std::nanf("")));
  cuda_->ops().Qkv(cuda_qkv, cuda_->stream());
  const std::vector<float> q = cuda_->GetElements(cuda_qkv.queries, rows_ * sizes_.q);
  std::vector<float> cpu_qkv = cpu_->Get<float>(qkv.queries, rows_ * sizes_.all);
  std::vector<float> want_q;
  for (size_t row = 0; row < rows_; ++row) {
    const auto at = cpu_qkv.begin() + static_cast<long>(row * sizes_.all);
    want_q.insert(want_q.end(), at, at + static_cast<long>(sizes_.q));
    std::copy_n(q.begin() + static_cast<long>(row * sizes_.q), sizes_.q, at);
  }
  Compare("queries", q, want_q, rows_, sizes_.q);
  // Pages: written where the CPU writes, and nowhere else.
  std::vector<float> got_pool = cuda_->GetPages(cuda_pages.base, PoolElements(), fp8_kv_);
  const std::vector<float> want_pool = cpu_->GetPages(cpu_pages.base, PoolElements(), fp8_kv_);
  std::vector<float> got_kv = got_pool, want_kv = want_pool;
  for (size_t i = 0; i < got_kv.size(); ++i) {
    if (std::isnan(want_kv[i]) && std::isnan(got_kv[i])) got_kv[i] = want_kv[i] = 0;
  }
  const size_t heads_of_pool = got_kv.size() / Size(c.head_dim);
  if (fp8_kv_) {
    CompareRounded("keys and values", got_kv, want_kv, heads_of_pool, Size(c.head_dim));
    const auto codes = cuda_->Get<uint8_t>(cuda_pages.base, PoolElements());
    cpu_->stream()->CopyToDevice(cpu_pages.base, codes.data(), codes.size());
  } else {
    Compare("keys and values", got_kv, want_kv, heads_of_pool, Size(c.head_dim));
    cpu_->stream()->CopyToDevice(cpu_pages.base, got_pool.data(), got_pool.size() * sizeof(float));
  }
  cpu_->stream()->CopyToDevice(qkv.queries, cpu_qkv.data(), cpu_qkv.size() * sizeof(float));

  AttentionArgs attention;
  attention.batch = &host_;
  attention.queries = qkv.queries;
  attention.pages = cpu_pages;
  attention.heads = c.heads;
  attention.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  attention.out = cpu_->Put(std::vector<float>(rows_ * sizes_.q));
  cpu_->ops().Attention(attention, cpu_->stream());
  const std::vector<float> want_attended = cpu_->Get<float>(attention.out, rows_ * sizes_.q);
  attention.batch = &cuda_batch_;
  attention.queries = cuda_qkv.queries;
  attention.pages = cuda_pages;
  // Rows of padding: something finite, for the products that follow.
  attention.out = cuda_->PutElements(std::vector<float>(all_rows_ * sizes_.q, 0.5f));
  cuda_->ops().Attention(attention, cuda_->stream());
  const std::vector<float> attended = cuda_->GetElements(attention.out, rows_ * sizes_.q);
  Compare("attention", attended, want_attended, rows_, sizes_.q);

  const auto add = [&](const char* what, size_t k, const std::vector<float>& x, const void* cuda_x,
                       const std::vector<float>& norm_after) {
    AddProjectionArgs args, cuda_args;
    PutProjections(hidden, k, c.biases > 1, &args.projection, &cuda_args.projection);
    args.rows = host_.num_rows;
    args.x = cpu_->Put(x);
    args.next_norm = {cpu_->Put(norm_after), kEpsilon};
    args.hidden = cpu_hidden;
    cpu_->ops().AddProjection(args, cpu_->stream());
    cuda_args.rows = cuda_host_.num_rows;
    cuda_args.x = cuda_x;
    cuda_args.next_norm = {cuda_->Put(norm_after), kEpsilon};
    cuda_args.hidden = cuda_hidden;
    cuda_->ops().AddProjection(cuda_args, cuda_->stream());
    const std::vector<float> got = cuda_->Get<float>(cuda_hidden, rows_ * hidden);
    Compare(what, got, cpu_->Get<float>(cpu_hidden, rows_ * hidden), rows_, hidden);
    cpu_->stream()->CopyToDevice(cpu_hidden, got.data(), got.size() * sizeof(float));
  };
  add("output projection", sizes_.q, attended, attention.out, next_norm);

  engine::GateUpArgs gate_up, cuda_gate_up;
  PutProjections(2 * inner, hidden, c.biases > 1, &gate_up.projection, &cuda_gate_up.projection);
  gate_up.rows = host_.num_rows;
  gate_up.hidden = cpu_hidden;
  gate_up.norm = {cpu_->Put(next_norm), kEpsilon};
  gate_up.out = cpu_->Put(std::vector<float>(rows_ * inner));
  cpu_->ops().GateUp(gate_up, cpu_->stream());
  cuda_gate_up.rows = cuda_host_.num_rows;
  cuda_gate_up.hidden = cuda_hidden;
  cuda_gate_up.norm = {cuda_->Put(next_norm), kEpsilon};
  cuda_gate_up.out = cuda_->PutElements(std::vector<float>(all_rows_ * inner, std::nanf("")));
  cuda_->ops().GateUp(cuda_gate_up, cuda_->stream());
  const std::vector<float> gated = cuda_->GetElements(cuda_gate_up.out, rows_ * inner);
  Compare("gate and up", gated, cpu_->Get<float>(gate_up.out, rows_ * inner), rows_, inner);
  add("down projection", inner, gated, cuda_gate_up.out, norm);

  engine::LogitsArgs logits, cuda_logits;
  PutProjections(vocab, hidden, false, &logits.projection, &cuda_logits.projection);
  std::vector<int32_t> row_ids;  // of some rows, in no order
  for (int i = 0; i < std::min(8, host_.num_rows); ++i) {
    row_ids.push_back(static_cast<int32_t>((7 * i + host_.num_rows - 1) % host_.num_rows));
  }
  logits.count = cuda_logits.count = static_cast<int>(row_ids.size());
  logits.hidden = cpu_hidden;
  logits.row_ids = cpu_->Put(row_ids);
  logits.norm = {cpu_->Put(norm), kEpsilon};
  logits.logits = cpu_->Put(std::vector<float>(row_ids.size() * vocab));
  cpu_->ops().Logits(logits, cpu_->stream());
  cuda_logits.hidden = cuda_hidden;
  cuda_logits.row_ids = cuda_->Put(row_ids);
  cuda_logits.norm = {cuda_->Put(norm), kEpsilon};
  cuda_logits.logits = cuda_->Put(std::vector<float>(row_ids.size() * vocab, std::nanf("")));
  cuda_->ops().Logits(cuda_logits, cuda_->stream());
  Compare("logits", cuda_->Get<float>(cuda_logits.logits, row_ids.size() * vocab),
          cpu_->Get<float>(logits.logits, row_ids.size() * vocab), row_ids.size(), vocab);
}

// Products are timed when the ops are made: that must not cost a start much.
TEST(CudaOpsStartTest, OpsOfTheShapeOfQwen7BAreMadeInTime) {
  auto device = CudaDevice::Open(0);
  if (!device.ok()) GTEST_SKIP() << device.status().ToString();
  OpsShape shape;
  shape.element = Element::kBFloat16;
  shape.max_rows = 8192;
  shape.max_items = 256;
  shape.max_logit_rows = 64;
  shape.hidden = shape.q_width = 3584;
  shape.kv_width = 512;
  shape.head_dim = 128;
  shape.inner = 18944;
  shape.vocab = 152064;
  for (const bool hopper : {true, false}) {
    CudaOpsOptions options;
    options.hopper = hopper;
    const auto begin = std::chrono::steady_clock::now();
    auto ops = MakeCudaOps(shape, device->get(), options);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    ASSERT_OK(ops);
    fmt::print("  {}: made in {:.2f} s\n", hopper ? "all kernels" : "without Hopper's",
               took.count());
    EXPECT_LT(took.count(), 5.0);
  }
}

std::vector<ItemRun> Decode(int count, int length) {
  std::vector<ItemRun> runs;
  for (int i = 0; i < count; ++i) runs.push_back({length + 13 * i, 1});
  return runs;
}

std::vector<Case> Cases() {
  constexpr Element kF32 = Element::kFloat32, kBF16 = Element::kBFloat16;
  const std::vector<ItemRun> mixed = {{0, 70}, {131, 1}, {40, 33}, {5, 1}, {300, 2}};
  const std::vector<ItemRun> padded = {{77, 1}, {0, 1},  {513, 1}, {15, 1},
                                       {16, 1}, {-1, 1}, {-1, 1},  {-1, 1}};
  return {
      // name, heads, kv_heads, head_dim, hidden, inner, vocab, block_size, biases, qk_norm,
      // embedding, runs
      {"GqaMixed", 7, 1, 128, 896, 1024, 1000, 16, 1, false, kBF16, mixed},
      {"Qwen7BDecode1", 28, 4, 128, 3584, 2368, 2000, 16, 1, false, kBF16, Decode(1, 77)},
      {"GqaDecodePadded", 14, 2, 128, 1792, 1152, 600, 16, 1, false, kBF16, padded},
      {"Decode40", 7, 1, 128, 896, 512, 512, 32, 1, false, kBF16, Decode(40, 3)},
      {"HeadDim64Prefill", 14, 2, 64, 896, 1216, 512, 16, 1, false, kBF16, {{0, 250}, {17, 40}}},
      {"MhaHeadDim64", 4, 4, 64, 256, 384, 512, 64, 1, false, kBF16, {{0, 33}, {90, 1}}},
      {"Qwen3Norms", 4, 2, 128, 384, 768, 320, 16, 0, true, kBF16, {{3, 20}, {129, 1}, {7, 1}}},
      {"OddWidths", 3, 3, 16, 48, 52, 100, 16, 2, false, kF32, {{0, 9}, {21, 1}, {31, 3}}},
      {"HeadDim8", 4, 2, 8, 64, 80, 112, 16, 0, false, kF32, {{0, 19}, {40, 1}}},
      {"HeadDim96Group5", 5, 1, 96, 200, 136, 77, 32, 2, true, kF32, {{0, 35}, {63, 1}}},
      {"HeadDim256", 2, 1, 256, 256, 264, 130, 256, 0, false, kBF16, {{250, 12}, {700, 1}}},
      {"LongPositions", 2, 1, 32, 256, 128, 64, 256, 1, false, kBF16, {{131000, 2}, {9999, 1}}},
  };
}

std::vector<Variant> Variants() {
  CudaOpsOptions skinny, hopper;
  skinny.hopper = false;
  skinny.skinny_rows = 64;
  hopper.skinny = hopper.decode_attention = hopper.library = false;
  CudaOpsOptions generic, plain;
  generic.skinny = generic.hopper = generic.overlap = false;
  generic.decode_attention = generic.prefill_attention = false;
  plain = generic;
  plain.library = false;
  return {{"Chosen", {}},
          {"Skinny", skinny},
          {"Hopper", hopper},
          {"Generic", generic},
          {"Plain", plain},
          {"ChosenKvInFp8", {}, true},
          {"SkinnyKvInFp8", skinny, true},
          {"HopperKvInFp8", hopper, true},
          {"PlainKvInFp8", plain, true}};
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaOpsTest,
                         ::testing::Combine(::testing::ValuesIn(Cases()),
                                            ::testing::ValuesIn(Variants())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) +
                                  std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace tandem::engine::cuda
