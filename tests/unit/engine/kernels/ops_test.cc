// Every op on every device of this build, in float32, beside its formula in float64.
#include "engine/kernels/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/kernels/philox.h"
#include "engine/runtime/backend.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::ElementsAre;

constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 8, kBlockSize = 16;
constexpr size_t kHidden = 24, kInner = 20, kVocab = 40;
constexpr size_t kQWidth = kHeads * kHeadDim, kKvWidth = kKvHeads * kHeadDim;
constexpr size_t kQkvWidth = kQWidth + 2 * kKvWidth;
constexpr float kEpsilon = 1e-6f;

using Rows = std::vector<std::vector<double>>;

class OpsTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = OpenBackend(GetParam(), {.num_threads = 2});
    if (!backend.ok()) GTEST_SKIP() << backend.status().ToString();
    backend_ = *std::move(backend);
    OpsShape shape;
    shape.max_rows = 8;
    shape.max_items = 4;
    shape.max_logit_rows = 4;
    shape.hidden = kHidden;
    shape.q_width = kQWidth;
    shape.kv_width = kKvWidth;
    shape.head_dim = kHeadDim;
    shape.inner = kInner;
    shape.vocab = kVocab;
    auto ops = backend_->MakeOps(shape);
    // A device may not compute in float32: then tests of its own compare it with the CPU.
    if (absl::IsInvalidArgument(ops.status())) GTEST_SKIP() << ops.status().ToString();
    ASSERT_OK(ops);
    ops_ = *std::move(ops);
    ASSERT_EQ(ops_->activation(), Element::kFloat32);
    stream_ = backend_->device().NewStream();
    MakeBatch();
  }

  // --- memory of the device ---
  template <typename T>
  T* Put(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    buffers_.push_back(backend_->device().Allocate(std::max<size_t>(bytes, 64)).value());
    stream_->CopyToDevice(buffers_.back().data(), values.data(), bytes);
    stream_->Synchronize();
    return buffers_.back().as<T>();
  }
  template <typename T>
  std::vector<T> Get(const T* from, size_t count) {
    std::vector<T> values(count);
    stream_->CopyToHost(values.data(), from, count * sizeof(T));
    stream_->Synchronize();
    return values;
  }

  std::vector<float> Random(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(random_);
    return values;
  }

  // A random matrix packed on the device, and its rows.
  Projection RandomProjection(size_t n, size_t k, bool bias, Rows* rows,
                              std::vector<float>* bias_values) {
    const std::vector<float> values = Random(n * k);
    rows->assign(n, std::vector<double>(k));
    for (size_t i = 0; i < n * k; ++i) (*rows)[i / k][i % k] = static_cast<double>(values[i]);
    buffers_.push_back(backend_->device().Allocate(ops_->PackedWeightBytes(n, k)).value());
    void* packed = buffers_.back().data();
    const size_t half = n / 2;  // in two parts, as query, key and value weights come
    ops_->PackWeightRows(values.data(), Element::kFloat32, half, k, 0, packed, stream_.get());
    ops_->PackWeightRows(values.data() + half * k, Element::kFloat32, n - half, k, half, packed,
                         stream_.get());
    stream_->Synchronize();
    Projection projection{{Element::kFloat32, n, k, packed}, nullptr};
    bias_values->assign(n, 0.0f);
    if (bias) projection.bias = Put(*bias_values = Random(n));
    return projection;
  }

  // --- formulas ---
  static std::vector<double> Normed(const float* x, size_t width,
                                    const std::vector<float>& weight) {
    double squares = 0;
    for (size_t i = 0; i < width; ++i)
      squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + kEpsilon);
    std::vector<double> out(width);
    for (size_t i = 0; i < width; ++i) {
      out[i] = static_cast<double>(x[i]) * scale * static_cast<double>(weight[i]);
    }
    return out;
  }
  static std::vector<double> Projected(const std::vector<double>& x, const Rows& weight,
                                       const std::vector<float>& bias) {
    std::vector<double> out(weight.size());
    for (size_t n = 0; n < weight.size(); ++n) {
      out[n] = static_cast<double>(bias[n]);
      for (size_t k = 0; k < x.size(); ++k) out[n] += x[k] * weight[n][k];
    }
    return out;
  }
  static void ExpectNear(const float* got, const std::vector<double>& want) {
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(static_cast<double>(got[i]), want[i], 1e-4) << "element " << i;
    }
  }

  // Two sequences: positions 14..18 of one that lies in blocks 2 and 0, 0..1 of one in block 1.
  void MakeBatch() {
    host_.num_rows = 7;
    host_.num_items = 2;
    host_.max_item_rows = 5;
    host_.max_length = 19;
    host_.token_ids = token_ids_.data();
    host_.positions = positions_.data();
    host_.first_rows = first_rows_.data();
    host_.starts = starts_.data();
    host_.first_blocks = first_blocks_.data();
    host_.blocks = blocks_.data();
    batch_ = host_;
    batch_.token_ids = Put(token_ids_);
    batch_.positions = Put(positions_);
    batch_.first_rows = Put(first_rows_);
    batch_.starts = Put(starts_);
    batch_.first_blocks = Put(first_blocks_);
    batch_.blocks = Put(blocks_);
    pages_ = {nullptr, Element::kFloat32, kKvHeads, kHeadDim, kBlockSize};
    pool_floats_ = 3 * 2 * kKvHeads * kBlockSize * kHeadDim;
    pages_.base = reinterpret_cast<std::byte*>(Put(
        std::vector<float>(pool_floats_, std::nanf(""))));  // nobody may read what is not written
  }
  // Place of (row, K or V, kv head) in the pool, in floats.
  size_t KvAt(int row, bool value, int head) const {
    const int item = row < 5 ? 0 : 1;
    const int position = positions_[static_cast<size_t>(row)];
    const int block = blocks_[static_cast<size_t>(first_blocks_[static_cast<size_t>(item)] +
                                                  position / kBlockSize)];
    return static_cast<size_t>(
        (((block * 2 + (value ? 1 : 0)) * kKvHeads + head) * kBlockSize + position % kBlockSize) *
        kHeadDim);
  }
  // Begin with the embedding given as the residual stream of the rows; returns where it lies.
  float* BeginWith(const std::vector<float>& embedding, const int32_t* drawn) {
    BeginArgs begin;
    begin.batch = &batch_;
    begin.host = &host_;
    begin.drawn = drawn;
    begin.embedding = Put(embedding);
    begin.frequencies = Put(frequencies_);
    begin.rope_scale = 1;
    begin.pages = pages_;
    begin.next_norm = {Put(norm_), kEpsilon};
    begin.hidden = Put(std::vector<float>(7 * kHidden));
    ops_->Begin(begin, stream_.get());
    return begin.hidden;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Stream> stream_;
  std::vector<Buffer> buffers_;
  std::mt19937 random_{5};
  const std::vector<int32_t> token_ids_ = {7, 3, 39, 0, 12, 5, PendingId(1)};
  const std::vector<int32_t> positions_ = {14, 15, 16, 17, 18, 0, 1};
  const std::vector<int32_t> first_rows_ = {0, 5, 7};
  const std::vector<int32_t> starts_ = {14, 0};
  const std::vector<int32_t> first_blocks_ = {0, 2, 3};
  const std::vector<int32_t> blocks_ = {2, 0, 1};
  const std::vector<float> frequencies_ = {1, 0.3f, 0.1f, 0.03f};
  const std::vector<float> norm_ = std::vector<float>(kHidden, 1.5f);
  RaggedBatch host_, batch_;
  KvPages pages_;
  size_t pool_floats_ = 0;
};

TEST_P(OpsTest, BeginGathersTheEmbeddingAlsoOfATokenJustDrawn) {
  const std::vector<float> embedding = Random(kVocab * kHidden);
  const float* hidden = BeginWith(embedding, Put(std::vector<int32_t>{11, 22}));
  const std::vector<float> got = Get(hidden, 7 * kHidden);
  const int32_t ids[] = {7, 3, 39, 0, 12, 5, 22};
  for (size_t row = 0; row < 7; ++row) {
    for (size_t i = 0; i < kHidden; ++i) {
      EXPECT_EQ(got[row * kHidden + i], embedding[static_cast<size_t>(ids[row]) * kHidden + i]);
    }
  }
}

TEST_P(OpsTest, QkvNormsProjectsRotatesAndWritesKeysAndValues) {
  for (const bool qk_norm : {false, true}) {
    SCOPED_TRACE(qk_norm ? "norms of heads" : "bias");
    const std::vector<float> embedding = Random(kVocab * kHidden);
    float* hidden = BeginWith(embedding, Put(std::vector<int32_t>{11, 22}));
    const std::vector<float> x = Get(hidden, 7 * kHidden);
    Rows weight;
    std::vector<float> bias;
    const std::vector<float> q_norm = Random(kHeadDim), k_norm = Random(kHeadDim);
    QkvArgs args;
    args.batch = &batch_;
    args.hidden = hidden;
    args.norm = {Put(norm_), kEpsilon};
    args.projection = RandomProjection(kQkvWidth, kHidden, !qk_norm, &weight, &bias);
    args.q_norm = qk_norm ? Put(q_norm) : nullptr;
    args.k_norm = qk_norm ? Put(k_norm) : nullptr;
    args.heads = kHeads;
    args.pages = pages_;
    args.queries = Put(std::vector<float>(7 * kQkvWidth));
    ops_->Qkv(args, stream_.get());
    const std::vector<float> pool = Get(reinterpret_cast<float*>(pages_.base), pool_floats_);
    for (int row = 0; row < 7; ++row) {
      std::vector<double> qkv =
          Projected(Normed(&x[static_cast<size_t>(row) * kHidden], kHidden, norm_), weight, bias);
      for (int head = 0; head < kKvHeads; ++head) {
        const size_t k = kQWidth + static_cast<size_t>(head) * kHeadDim, v = k + kKvWidth;
        std::vector<float> key(qkv.begin() + static_cast<long>(k),
                               qkv.begin() + static_cast<long>(k + kHeadDim));
        std::vector<double> want(key.begin(), key.end());
        if (qk_norm) want = Normed(key.data(), kHeadDim, k_norm);
        for (size_t i = 0; i < kHeadDim / 2; ++i) {
          const double angle =
              positions_[static_cast<size_t>(row)] * static_cast<double>(frequencies_[i]);
          const double low = want[i], high = want[i + kHeadDim / 2];
          want[i] = low * std::cos(angle) - high * std::sin(angle);
          want[i + kHeadDim / 2] = high * std::cos(angle) + low * std::sin(angle);
        }
        ExpectNear(&pool[KvAt(row, false, head)], want);
        ExpectNear(&pool[KvAt(row, true, head)], {qkv.begin() + static_cast<long>(v),
                                                  qkv.begin() + static_cast<long>(v + kHeadDim)});
      }
    }
  }
}

TEST_P(OpsTest, AttentionOfOnePositionIsItsValue) {
  // More is attention_test.cc's; here: that Qkv's queries and pages are what Attention reads.
  float* hidden = BeginWith(Random(kVocab * kHidden), Put(std::vector<int32_t>{11, 22}));
  Rows weight;
  std::vector<float> bias;
  QkvArgs qkv;
  qkv.batch = &batch_;
  qkv.hidden = hidden;
  qkv.norm = {Put(norm_), kEpsilon};
  qkv.projection = RandomProjection(kQkvWidth, kHidden, true, &weight, &bias);
  qkv.heads = kHeads;
  qkv.pages = pages_;
  qkv.queries = Put(std::vector<float>(7 * kQkvWidth));
  // Positions 0..13 of the first sequence, which other steps wrote.
  std::vector<float> pool(pool_floats_, 0.0f);
  stream_->CopyToDevice(pages_.base, pool.data(), pool_floats_ * sizeof(float));
  ops_->Qkv(qkv, stream_.get());
  AttentionArgs args;
  args.batch = &batch_;
  args.queries = qkv.queries;
  args.pages = pages_;
  args.heads = kHeads;
  args.scale = 0.3f;
  float* out = Put(std::vector<float>(7 * kQWidth));
  args.out = out;
  ops_->Attention(args, stream_.get());
  const std::vector<float> got = Get(out, 7 * kQWidth);
  pool = Get(reinterpret_cast<float*>(pages_.base), pool_floats_);
  for (int head = 0; head < kHeads; ++head) {  // row 5 is position 0: it sees itself alone
    const float* value = &pool[KvAt(5, true, head / (kHeads / kKvHeads))];
    for (size_t i = 0; i < kHeadDim; ++i) {
      EXPECT_FLOAT_EQ(got[5 * kQWidth + static_cast<size_t>(head) * kHeadDim + i], value[i]);
    }
  }
}

TEST_P(OpsTest, AddProjectionAddsToTheResidualStream) {
  const std::vector<float> x = Random(3 * kQWidth), before = Random(3 * kHidden);
  Rows weight;
  std::vector<float> bias;
  AddProjectionArgs args;
  args.rows = 3;
  args.x = Put(x);
  args.projection = RandomProjection(kHidden, kQWidth, true, &weight, &bias);
  args.next_norm = {Put(norm_), kEpsilon};
  args.hidden = Put(before);
  ops_->AddProjection(args, stream_.get());
  const std::vector<float> got = Get(args.hidden, 3 * kHidden);
  for (size_t row = 0; row < 3; ++row) {
    std::vector<double> want = Projected({x.begin() + static_cast<long>(row * kQWidth),
                                          x.begin() + static_cast<long>((row + 1) * kQWidth)},
                                         weight, bias);
    for (size_t i = 0; i < kHidden; ++i) want[i] += static_cast<double>(before[row * kHidden + i]);
    ExpectNear(&got[row * kHidden], want);
  }
}

TEST_P(OpsTest, GateUpIsTheGatedProduct) {
  const std::vector<float> embedding = Random(kVocab * kHidden);
  float* hidden = BeginWith(embedding, Put(std::vector<int32_t>{11, 22}));
  const std::vector<float> x = Get(hidden, 7 * kHidden);
  Rows weight;
  std::vector<float> bias;
  GateUpArgs args;
  args.rows = 7;
  args.hidden = hidden;
  args.norm = {Put(norm_), kEpsilon};
  args.projection = RandomProjection(2 * kInner, kHidden, false, &weight, &bias);
  float* out = Put(std::vector<float>(7 * kInner));
  args.out = out;
  ops_->GateUp(args, stream_.get());
  const std::vector<float> got = Get(out, 7 * kInner);
  for (size_t row = 0; row < 7; ++row) {
    const std::vector<double> both =
        Projected(Normed(&x[row * kHidden], kHidden, norm_), weight, bias);
    std::vector<double> want(kInner);
    for (size_t i = 0; i < kInner; ++i)
      want[i] = both[i] / (1 + std::exp(-both[i])) * both[kInner + i];
    ExpectNear(&got[row * kInner], want);
  }
}

TEST_P(OpsTest, LogitsAreOfTheRowsAskedFor) {
  const std::vector<float> embedding = Random(kVocab * kHidden);
  float* hidden = BeginWith(embedding, Put(std::vector<int32_t>{11, 22}));
  const std::vector<float> x = Get(hidden, 7 * kHidden);
  Rows weight;
  std::vector<float> bias;
  LogitsArgs args;
  args.hidden = hidden;
  args.row_ids = Put(std::vector<int32_t>{6, 4});
  args.count = 2;
  args.norm = {Put(norm_), kEpsilon};
  args.projection = RandomProjection(kVocab, kHidden, false, &weight, &bias);
  args.logits = Put(std::vector<float>(2 * kVocab));
  ops_->Logits(args, stream_.get());
  const std::vector<float> got = Get(args.logits, 2 * kVocab);
  ExpectNear(&got[0], Projected(Normed(&x[6 * kHidden], kHidden, norm_), weight, bias));
  ExpectNear(&got[kVocab], Projected(Normed(&x[4 * kHidden], kHidden, norm_), weight, bias));
}

TEST_P(OpsTest, RowsAreSelected) {
  for (const size_t width : {size_t{3}, size_t{8}}) {
    const std::vector<float> from = Random(5 * width);
    float* to = Put(std::vector<float>(2 * width));
    SelectRowsArgs args;
    args.row_ids = Put(std::vector<int32_t>{1, 4});
    args.count = 2;
    args.from = Put(from);
    args.row_bytes = width * sizeof(float);
    args.to = to;
    ops_->SelectRows(args, stream_.get());
    std::vector<float> want(from.begin() + static_cast<ptrdiff_t>(width),
                            from.begin() + static_cast<ptrdiff_t>(2 * width));
    want.insert(want.end(), from.begin() + static_cast<ptrdiff_t>(4 * width), from.end());
    EXPECT_EQ(Get(to, 2 * width), want);
  }
}

class SampleTest : public OpsTest {
 protected:
  // Draws by `specs` from rows of logits; drawn_ and the results are what came out.
  std::vector<DrawResult> Sample(const std::vector<float>& logits,
                                 const std::vector<DrawSpec>& specs,
                                 const std::vector<int32_t>& token_lists) {
    SampleArgs args;
    args.logits = Put(logits);
    args.count = static_cast<int>(specs.size());
    args.valid_vocab = kVocab - 2;
    args.specs = Put(specs);
    args.token_lists = Put(token_lists);
    args.drawn_before = Put(std::vector<int32_t>{30, 31});
    args.drawn = Put(std::vector<int32_t>(4, -5));
    args.results = Put(std::vector<DrawResult>(specs.size()));
    ops_->Sample(args, stream_.get());
    drawn_ = Get(args.drawn, 4);
    return Get(args.results, specs.size());
  }
  static std::vector<float> Peak(std::initializer_list<int> ids) {
    std::vector<float> row(kVocab, 0.0f);
    float value = 10;
    for (const int id : ids) row[static_cast<size_t>(id)] = value--;
    return row;
  }

  std::vector<int32_t> drawn_;
};

TEST_P(SampleTest, EveryItemsTokenIsLeftForTheNextStep) {
  std::vector<float> logits = Peak({17}), second = Peak({39, 38, 4});  // 38 and 39 are padding
  logits.insert(logits.end(), second.begin(), second.end());
  std::vector<DrawSpec> specs(2);
  specs[0].item = 2;
  specs[1].item = 0;
  const std::vector<DrawResult> results = Sample(logits, specs, {});
  EXPECT_EQ(results[0].token, 17);
  EXPECT_EQ(results[1].token, 4);
  EXPECT_THAT(drawn_, ElementsAre(4, -5, 17, -5));
}

TEST_P(SampleTest, ARowThatCannotBeDrawnLeavesAValidTokenAndItsNeighboursAlone) {
  std::vector<float> logits = Peak({17}), second = Peak({4});
  logits[3] = std::nanf("");
  logits.insert(logits.end(), second.begin(), second.end());
  std::vector<DrawSpec> specs(2);
  specs[1].item = 1;
  const std::vector<DrawResult> results = Sample(logits, specs, {});
  EXPECT_EQ(results[0].status, DrawStatus::kNan);
  EXPECT_EQ(results[1].status, DrawStatus::kOk);
  EXPECT_THAT(drawn_, ElementsAre(0, 4, -5, -5));
}

TEST_P(SampleTest, PenaltiesCountATokenThatWasJustDrawn) {
  DrawSpec spec;
  spec.frequency_penalty = 3;
  const std::vector<int32_t> lists = {9, 9, PendingId(1)};  // item 1 drew 31
  spec.history_begin = 1;
  spec.output_begin = 2;
  spec.history_end = 3;
  EXPECT_EQ(Sample(Peak({31, 9}), {spec}, lists)[0].token, 9);
}

TEST_P(SampleTest, DrawsAreAFunctionOfSeedAndPosition) {
  const std::vector<float> logits(kVocab, 0.0f);  // all equally likely
  DrawSpec spec;
  spec.temperature = 1;
  for (int position = 0; position < 50; ++position) {
    spec.position = position;
    spec.seed = 77;
    const double uniform = UniformAt(77, static_cast<uint64_t>(position));
    EXPECT_EQ(Sample(logits, {spec}, {})[0].token, static_cast<int>(uniform * (kVocab - 2)));
  }
}

TEST_P(SampleTest, AScoredRowGivesTheLogProbabilityAndDrawsNothing) {
  DrawSpec spec;
  spec.scored = 9;
  spec.alternatives = 2;
  const DrawResult result = Sample(Peak({31, 9}), {spec}, {})[0];
  const double sum = std::log(std::exp(10.0) + std::exp(9.0) + (kVocab - 4));
  EXPECT_EQ(result.token, 9);
  EXPECT_NEAR(static_cast<double>(result.logprob), 9 - sum, 1e-5);
  ASSERT_EQ(result.num_alternatives, 2);
  EXPECT_EQ(result.alternatives[0], 31);
  EXPECT_EQ(drawn_[0], -5);
}

std::vector<std::string> DeviceNames() {
  std::vector<std::string> names;
  for (const BackendEntry& backend : Backends()) names.push_back(backend.name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Devices, OpsTest, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& info) { return info.param; });
INSTANTIATE_TEST_SUITE_P(Devices, SampleTest, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tandem::engine
