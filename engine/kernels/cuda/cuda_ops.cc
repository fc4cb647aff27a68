// Which kernel computes what.
//
//               | up to skinny_rows   | more rows, sm_90a   | all other products
//   products    | skinny_linear.h     | hopper_linear.h     | cublas_linear.h, elementwise.h
//   attention   | of one row an item: decode_attention.h; of runs: prefill_attention.h;
//               | of shapes that those do not take: plain_attention.h
//
// Norms. The fused products (skinny, hopper) read `scaled`, the residual stream times the norm's
// weight, and the sums of its squares (linear_args.h). Who changes the residual stream by a fused
// product leaves both for the next norm; after a generic one, and after a sum over ranks, they are
// made when a fused product asks for them. So each op chooses for itself.
//
// Where many rows can be computed both by Hopper's kernels and by cuBLASLt's with those of
// elementwise.h, both are timed at start and the faster is taken, by buckets of rows. That is so
// for queries, keys and values and for the residual products; of the others Hopper's save too much.
//
// Weights of 4 bits: up to kMaxInt4Rows rows by int4_linear.h, of which sm_90a computes the larger
// part by hopper_int4_linear.h. For more, and for what their epilogues do not know, the weight is
// made bfloat16 in scratch memory, and the product is as any other.
//
// KV in e4m3: all writers and readers of pages but Hopper's prefill attention take it as it is. For
// the runs of a step that are worth it the pages are made bfloat16 (wide_pages.h) in front of that.
//
// --batch-invariant: the hopper products without their scratch memory, else cuBLASLt with one
// algorithm for all numbers of rows; all attention by one of the kernels for runs, which split
// positions at fixed ones or never.
#include "engine/kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/device/cuda/cuda_check.h"
#include "engine/kernels/cuda/cublas_linear.h"
#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/dummy_values.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/hopper_int4_linear.h"
#include "engine/kernels/cuda/hopper_linear.h"
#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/int4_matrix.h"
#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/plain_attention.h"
#include "engine/kernels/cuda/prefill_attention.h"
#include "engine/kernels/cuda/sample.h"
#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/step.h"
#include "engine/kernels/cuda/wide_pages.h"

namespace tandem::engine::cuda {
namespace {

// Rows of the feed-forward block computed together by the generic kernels: enough that the products
// run at full speed, few enough that both halves of them need little memory.
constexpr size_t kMlpTile = 1024;
constexpr size_t kAlignment = 256;  // bytes
constexpr int kHopper = 90;         // compute capability
// Rows up to which the skinny products win over Hopper's.
constexpr int kSkinnyRowsOnHopper = 8;
// Up to how many rows FlashInfer's prefill attention is faster on Hopper too: 8 rows over 8,192
// positions take 19 us, not 21, but 16 take 28, not 21.
constexpr int kFewPrefillRows = 8;

// Pages of e4m3 are made bfloat16 for Hopper's prefill attention where a run has as many rows, and
// up to as many bytes of them: what is saved is more than the copy takes. That is 131,072 positions
// of a model with 4 KV heads of 128.
constexpr int kWidenedRows = 64;
constexpr size_t kWideBytes = size_t{256} << 20;
constexpr size_t kLeastBlockSize = 16;

constexpr size_t kRowBuckets = 32;  // powers of two
// Rows from which the library is worth a try against Hopper's kernels.
constexpr size_t kLibraryRows = 256;
constexpr int kTimings = 3;
constexpr size_t kTimedRows = 4096;  // of one timing, by as many products as that takes
// The library must win by more than timings err: two workers of one kind of card should choose
// alike, or the same prompt has other last bits on the one than on the other.
constexpr float kClearly = 0.9f;

size_t BucketOf(size_t rows) { return static_cast<size_t>(std::bit_width(rows - 1)); }

int AsInt(size_t value) { return static_cast<int>(value); }

const __nv_bfloat16* BFloat16(const void* data) { return static_cast<const __nv_bfloat16*>(data); }
const __nv_bfloat16* WeightOf(const Projection& projection) {
  return BFloat16(projection.weight.data);
}

// Deals out parts of one allocation; with no base it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  void Take(size_t count, T** out) {
    *out = base_ == nullptr || count == 0 ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

class CudaOps final : public Ops {
 public:
  CudaOps(const OpsShape& shape, CudaDevice* device, const CudaOpsOptions& options);

  absl::Status Prepare();

  Element activation() const override { return Element::kBFloat16; }
  size_t PackedWeightBytes(size_t n, size_t k) const override { return n * k * sizeof(uint16_t); }
  void PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                      size_t first_column, void* packed, Stream* stream) override;
  size_t PackedInt4Bytes(const Int4Shape& shape) const override;
  void PackInt4Rows(const Int4Shape& shape, const Int4Rows& rows, void* packed,
                    Stream* stream) override;
  bool packs_plain_rows() const override { return true; }
  bool fills_dummies() const override { return true; }
  void FillDummy(uint64_t key, uint64_t first, size_t count, uint16_t* out,
                 Stream* stream) override;

  void Begin(const BeginArgs& args, Stream* stream) override;
  void Qkv(const engine::QkvArgs& args, Stream* stream) override;
  void Attention(const AttentionArgs& args, Stream* stream) override;
  void SelectRows(const SelectRowsArgs& args, Stream* stream) override;
  void AddProjection(const AddProjectionArgs& args, Stream* stream) override;
  void GateUp(const engine::GateUpArgs& args, Stream* stream) override;
  void Logits(const engine::LogitsArgs& args, Stream* stream) override;
  void Sample(const SampleArgs& args, Stream* stream) override;

 private:
  // How a product is computed.
  enum class Path { kGeneric, kSkinny, kHopper };
  Path PathOf(int rows, int outputs, int inputs, int head_dim) const;
  bool HopperTakes(size_t outputs, size_t inputs, size_t head_dim) const {
    return options_.hopper && HopperSupports(AsInt(outputs), AsInt(inputs), AsInt(head_dim));
  }

  // Weights of 4 bits.
  Int4Layout LayoutOf(Int4Pairs pairs, size_t n, size_t k, size_t group_size) const {
    return Int4Layout::Of(pairs, AsInt(shape_.head_dim), AsInt(n), AsInt(k), AsInt(group_size),
                          device_->multiprocessors());
  }
  struct Int4Weight {
    Int4Layout layout;
    Int4Matrix matrix;
  };
  Int4Weight Int4Of(const PackedMatrix& weight, Int4Pairs pairs) const {
    const Int4Layout layout = LayoutOf(pairs, weight.n, weight.k, weight.group_size);
    const auto* data = static_cast<const std::byte*>(weight.data);
    return {layout, layout.At(data, data + layout.ValueBytes())};
  }
  bool Int4Takes(const Projection& projection, int rows) const {
    return projection.weight.group_size != 0 && !shape_.batch_invariant && rows <= kMaxInt4Rows;
  }
  bool HopperInt4Takes(int rows, int inputs) const {
    const LaunchOptions launch{nullptr, device_->multiprocessors(), shared_bytes_, overlap_};
    return options_.hopper && SupportsHopperInt4Linear(rows, inputs, launch);
  }
  // How many clusters run at once differs between cards of one kind, and with it where a sum would
  // be cut: without scratch memory none is.
  HopperScratch LogitsScratch() const {
    return shape_.ranks == 1 ? scratch_.hopper : HopperScratch{};
  }
  // The activations as the weight's inputs are ordered.
  const __nv_bfloat16* Ordered(const PackedMatrix& weight, const __nv_bfloat16* x, int rows,
                               Stream* stream);
  // The projection with its weight in bfloat16.
  Projection Plain(const Projection& projection, Int4Pairs pairs, Stream* stream);
  // How a product of Plain() is launched. One that starts beside its predecessor fetches weights at
  // once, and the predecessor may be who makes them.
  LaunchOptions ProductLaunch(const Projection& original, Stream* stream) const {
    return original.weight.group_size == 0 ? Beside(stream) : After(stream);
  }

  // The generic products, each timed at start where it can occur.
  ProductShape QkvShape() const {
    return {AsInt(shape_.q_width + 2 * shape_.kv_width), AsInt(shape_.hidden),
            ProductOutput::kFloat32};
  }
  ProductShape GateUpShape() const {
    return {AsInt(2 * shape_.inner), AsInt(shape_.hidden), ProductOutput::kFloat32};
  }
  ProductShape AddShape(size_t inputs) const {
    return {AsInt(shape_.hidden), AsInt(inputs), ProductOutput::kAddFloat32};
  }
  ProductShape LogitsShape() const {
    return {AsInt(shape_.vocab), AsInt(shape_.hidden), ProductOutput::kFloat32};
  }
  absl::Status TimeProducts();
  bool MayChooseLibrary() const {
    return options_.hopper && options_.library && !shape_.batch_invariant &&
           shape_.max_rows >= kLibraryRows;
  }
  // Memory for TimeAgainstLibrary, and what it settles: library_wins_.
  size_t TimingBytes() const;
  void TimeAgainstLibrary(const Buffer& scratch, Stream* stream);
  template <typename Run>  // void(int rows)
  void TimePaths(const PackedMatrix& weight, const Run& run, Stream* stream);
  bool LibraryWins(const PackedMatrix& weight, int rows) const;
  void Product(const ProductShape& shape, int rows, const __nv_bfloat16* x,
               const Projection& projection, void* y, Stream* stream);

  // Everything that lies in scratch memory.
  struct Scratch {
    // Of the step.
    float* cos = nullptr;  // [max_rows][head_dim / 2]
    float* sin = nullptr;
    int64_t* slots = nullptr;            // [max_rows]
    DecodeItem* decode_items = nullptr;  // [max_items + 1]
    // Between ops: what scaled_for_ is about; or the generic products' normed input.
    __nv_bfloat16* scaled = nullptr;  // [max(max_rows, max_logit_rows)][hidden]
    float* shares = nullptr;          // of square sums
    // Within an op.
    float* qkv = nullptr;      // [max_rows][q_width + 2 * kv_width], generic
    float* gate_up = nullptr;  // [mlp_tile_][2 * inner], generic
    std::byte* cublas = nullptr;
    SkinnyScratch skinny;
    HopperScratch hopper;
    Int4Scratch int4;
    __nv_bfloat16* ordered = nullptr;      // [kMaxInt4Rows][the most inputs]
    __nv_bfloat16* dequantised = nullptr;  // the largest of a layer's weights
    DecodeAttentionScratch decode;
    __nv_bfloat16* wide_pages = nullptr;   // of the runs of a step
    int32_t* first_wide_blocks = nullptr;  // [max_items + 1]
    int32_t* wide_blocks = nullptr;        // 0, 1, ...
    float* prefill_partial = nullptr;
    uint32_t* prefill_flags = nullptr;
    std::byte* sample = nullptr;
  };
  size_t Carve(std::byte* base);

  void BeginFused(const BeginArgs& args, Stream* stream);
  void BeginGeneric(const BeginArgs& args, Stream* stream);
  void QkvGeneric(const engine::QkvArgs& args, Stream* stream);
  void GateUpGeneric(const engine::GateUpArgs& args, Stream* stream);
  void AddProjectionGeneric(const AddProjectionArgs& args, Stream* stream);
  // What a fused product leaves for the next norm, unless that reads a sum over ranks.
  void LeaveNorm(const AddProjectionArgs& args, const SquareSums& squares);
  bool DecodeTakes(const AttentionArgs& args, Stream* stream) const;
  void DecodeRows(const AttentionArgs& args, Stream* stream);
  void Runs(const AttentionArgs& args, bool skip_single_rows, Stream* stream);
  cudaError_t FastRuns(const PrefillAttentionArgs& runs, Stream* stream);

  // Pages of e4m3 for Hopper's prefill attention: whether a step's runs may have wide ones, for how
  // many positions there is room, how many blocks those of the step that begins take; and the same
  // runs over these.
  bool MayWiden() const {
    return shape_.fp8_kv && options_.hopper && options_.prefill_attention &&
           !shape_.batch_invariant && (shape_.head_dim == 64 || shape_.head_dim == 128);
  }
  size_t WidePositions() const { return kWideBytes / (4 * shape_.kv_width); }
  void CountWideBlocks(const BeginArgs& args, Stream* stream);
  PrefillAttentionArgs Widened(PrefillAttentionArgs runs, Stream* stream);

  // Makes scaled and shares those of `norm` over `rows` rows of `hidden`, or those that row_ids
  // names, unless they are that already.
  SquareSums Scaled(const float* hidden, const int32_t* row_ids, const Norm& norm, int rows,
                    Stream* stream);
  const __nv_bfloat16* Normed(const float* hidden, const int32_t* row_ids, const Norm& norm,
                              int rows, Stream* stream);

  cudaStream_t Handle(Stream* stream) const { return static_cast<CudaStream*>(stream)->handle(); }
  // Of kernels that start beside their predecessor. That may be one of the library's: it starts
  // when all before it is over.
  LaunchOptions Beside(Stream* stream) const {
    return {Handle(stream), device_->multiprocessors(), shared_bytes_, overlap_};
  }
  // Of others, which wait for the end of what is before them.
  LaunchOptions After(Stream* stream) const {
    return {Handle(stream), device_->multiprocessors(), shared_bytes_, false};
  }

  const OpsShape shape_;
  CudaDevice* const device_;
  CudaOpsOptions options_;  // what the device cannot do is false
  bool overlap_ = false;
  int shared_bytes_ = 0;
  size_t mlp_tile_ = 0;                                 // rows
  bool generic_qkv_ = false, generic_gate_up_ = false;  // can occur
  size_t square_stride_ = 0;  // of shares, where the skinny kernels do not set it
  Buffer memory_;             // holds what scratch_ points to
  Scratch scratch_;
  std::unique_ptr<CublasLinear> cublas_;  // null: no shape can need it
  // By outputs and inputs of the weight, then by the power of two that holds the rows.
  std::map<std::pair<size_t, size_t>, std::array<bool, kRowBuckets>> library_wins_;

  // Of the step that is being given to the stream.
  int single_rows_ = 0;  // items of one row, padding included
  bool has_decode_items_ = false;
  int num_wide_blocks_ = 0;  // 0: pages are read as they are
  // The norm that scratch_.scaled is made for, and its square sums; null: of none.
  const float* scaled_for_ = nullptr;
  SquareSums squares_;
};

// --- making ---

CudaOps::CudaOps(const OpsShape& shape, CudaDevice* device, const CudaOpsOptions& options)
    : shape_(shape), device_(device), options_(options) {
  const bool is_hopper = device->compute_capability() == kHopper;
  options_.hopper = options.hopper && is_hopper;
  options_.skinny = options.skinny && !shape.batch_invariant;
  options_.decode_attention = options.decode_attention && !shape.batch_invariant;
  if (options.skinny_rows == 0) {
    options_.skinny_rows = is_hopper ? kSkinnyRowsOnHopper : kMaxSkinnyRows;
  }
  overlap_ = options.overlap && device->compute_capability() >= kHopper;
  TANDEM_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                           device->ordinal()));
}

CudaOps::Path CudaOps::PathOf(int rows, int outputs, int inputs, int head_dim) const {
  const LaunchOptions launch{nullptr, device_->multiprocessors(), shared_bytes_, overlap_};
  if (options_.skinny && rows <= options_.skinny_rows &&
      SupportsSkinnyLinear(rows, outputs, inputs, launch)) {
    return Path::kSkinny;
  }
  if (options_.hopper && HopperSupports(outputs, inputs, head_dim)) return Path::kHopper;
  return Path::kGeneric;
}

size_t CudaOps::Carve(std::byte* base) {
  const OpsShape& s = shape_;
  Scratch& m = scratch_;
  const int multiprocessors = device_->multiprocessors();
  const size_t half = s.head_dim / 2, rows = std::max(s.max_rows, s.max_logit_rows);
  square_stride_ = rows;
  const size_t shares =
      std::max({size_t{kMaxSquareParts} * kMaxSkinnyRows,
                static_cast<size_t>(HopperSquareParts(AsInt(s.hidden))) * rows, rows});
  generic_qkv_ = s.qk_norm || MayChooseLibrary() ||
                 !HopperTakes(s.q_width + 2 * s.kv_width, s.hidden, s.head_dim);
  generic_gate_up_ = s.mlp_bias || !HopperTakes(s.inner, s.hidden, 0);
  mlp_tile_ = std::min(s.max_rows, kMlpTile);
  Carver carver(base);
  carver.Take(s.max_rows * half, &m.cos);
  carver.Take(s.max_rows * half, &m.sin);
  carver.Take(s.max_rows, &m.slots);
  carver.Take(s.max_items + 1, &m.decode_items);
  carver.Take(rows * s.hidden, &m.scaled);
  carver.Take(shares, &m.shares);
  carver.Take(generic_qkv_ ? s.max_rows * (s.q_width + 2 * s.kv_width) : 0, &m.qkv);
  carver.Take(generic_gate_up_ ? mlp_tile_ * 2 * s.inner : 0, &m.gate_up);
  carver.Take(CublasLinear::kWorkspaceBytes, &m.cublas);
  carver.Take(options_.skinny ? SkinnyPartialFloats(multiprocessors) : 0, &m.skinny.partial);
  carver.Take(kSkinnyCounters, &m.skinny.counters);
  carver.Take(kTurns, &m.skinny.turns);
  // Without its scratch memory no sum is cut.
  const bool cut = options_.hopper && !s.batch_invariant;
  carver.Take(cut ? HopperPartialFloats(multiprocessors) : 0, &m.hopper.partial);
  carver.Take(cut ? HopperFlags(multiprocessors) : 0, &m.hopper.flags);
  const size_t most_inputs = std::max({s.hidden, s.q_width, s.inner});
  const size_t largest = std::max(
      {(s.q_width + 2 * s.kv_width) * s.hidden, s.hidden * s.q_width, 2 * s.inner * s.hidden});
  carver.Take(s.int4 ? Int4PartialFloats(multiprocessors) : 0, &m.int4.partial);
  carver.Take(s.int4 ? kInt4Counters : 0, &m.int4.counters);
  m.int4.turns = m.skinny.turns;
  carver.Take(s.int4 ? kMaxInt4Rows * most_inputs : 0, &m.ordered);
  carver.Take(s.int4 ? largest : 0, &m.dequantised);
  const int head_dim = AsInt(s.head_dim);
  carver.Take(DecodeAttentionParts(head_dim, multiprocessors), &m.decode.parts);
  carver.Take(static_cast<size_t>(multiprocessors), &m.decode.launches);
  m.decode.turns = m.skinny.turns;
  carver.Take(MayWiden() ? WidePositions() * 2 * s.kv_width : 0, &m.wide_pages);
  carver.Take(MayWiden() ? s.max_items + 1 : 0, &m.first_wide_blocks);
  carver.Take(MayWiden() ? WidePositions() / kLeastBlockSize : 0, &m.wide_blocks);
  carver.Take(PrefillAttentionPartialFloats(head_dim, multiprocessors), &m.prefill_partial);
  carver.Take(PrefillAttentionFlags(multiprocessors), &m.prefill_flags);
  carver.Take(SampleScratchBytes(AsInt(s.max_logit_rows), AsInt(s.vocab)), &m.sample);
  return carver.used();
}

absl::Status CudaOps::Prepare() {
  // Zeroed, as the kernels' counters must begin.
  absl::StatusOr<Buffer> memory = device_->Allocate(Carve(nullptr));
  if (!memory.ok()) return memory.status();
  memory_ = *std::move(memory);
  Carve(memory_.as<std::byte>());
  if (scratch_.wide_blocks != nullptr) {
    std::vector<int32_t> numbers(WidePositions() / kLeastBlockSize);
    std::iota(numbers.begin(), numbers.end(), 0);
    const std::unique_ptr<Stream> stream = device_->NewStream();
    stream->CopyToDevice(scratch_.wide_blocks, numbers.data(), numbers.size() * sizeof(int32_t));
    stream->Synchronize();
  }
  return TimeProducts();
}

absl::Status CudaOps::TimeProducts() {
  const OpsShape& s = shape_;
  std::vector<std::pair<ProductShape, size_t>> products;  // with their largest number of rows
  const auto may_add = [&](bool can_occur, const ProductShape& product, size_t rows) {
    if (can_occur) products.emplace_back(product, rows);
  };
  const bool choose = MayChooseLibrary();
  const bool must = s.qk_norm || !HopperTakes(s.q_width + 2 * s.kv_width, s.hidden, s.head_dim) ||
                    s.output_bias || !HopperTakes(s.hidden, s.q_width, 0) || generic_gate_up_ ||
                    s.mlp_bias || !HopperTakes(s.hidden, s.inner, 0) ||
                    !HopperTakes(s.vocab, s.hidden, 0);
  if (!options_.library || (!must && !choose)) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<CublasLinear>> cublas =
      CublasLinear::Create(scratch_.cublas, s.batch_invariant);
  if (!cublas.ok() && !must) return absl::OkStatus();
  if (!cublas.ok()) return cublas.status();
  cublas_ = *std::move(cublas);
  may_add(generic_qkv_, QkvShape(), s.max_rows);
  may_add(choose || s.output_bias || !HopperTakes(s.hidden, s.q_width, 0), AddShape(s.q_width),
          s.max_rows);
  may_add(generic_gate_up_, GateUpShape(), mlp_tile_);
  may_add(choose || s.mlp_bias || !HopperTakes(s.hidden, s.inner, 0), AddShape(s.inner),
          s.max_rows);
  // Ranks must choose alike, or they draw different tokens, and timings differ.
  may_add(s.ranks == 1 && !HopperTakes(s.vocab, s.hidden, 0), LogitsShape(), s.max_logit_rows);
  size_t bytes = 0;
  for (const auto& [product, rows] : products) {
    bytes = std::max(bytes, CublasLinear::PrepareBytes(product, AsInt(rows)));
  }
  if (choose) bytes = std::max(bytes, TimingBytes());
  // Given back before the weights come.
  absl::StatusOr<Buffer> scratch = device_->Allocate(bytes);
  if (!scratch.ok()) return scratch.status();
  const std::unique_ptr<Stream> stream = device_->NewStream();
  for (const auto& [product, rows] : products) {
    const absl::Status status =
        cublas_->Prepare(product, AsInt(rows), scratch->data(), Handle(stream.get()));
    if (!status.ok()) return status;
  }
  if (choose) TimeAgainstLibrary(*scratch, stream.get());
  return absl::OkStatus();
}

size_t CudaOps::TimingBytes() const {
  const size_t hidden = shape_.hidden, inputs = std::max(shape_.q_width, shape_.inner);
  const size_t outputs = shape_.q_width + 2 * shape_.kv_width;
  return (std::max(hidden * inputs, outputs * hidden) + shape_.max_rows * inputs) * 2 +
         shape_.max_rows * outputs * 2 + (shape_.max_rows + 1) * hidden * sizeof(float) +
         5 * kAlignment;
}

void CudaOps::TimeAgainstLibrary(const Buffer& scratch, Stream* stream) {
  const size_t hidden_size = shape_.hidden, largest = std::max(shape_.q_width, shape_.inner);
  const size_t outputs = shape_.q_width + 2 * shape_.kv_width;
  const size_t weights = std::max(hidden_size * largest, outputs * hidden_size);
  Carver carver(scratch.as<std::byte>());
  __nv_bfloat16 *weight = nullptr, *x = nullptr, *queries = nullptr;
  float *hidden = nullptr, *norm = nullptr;
  carver.Take(weights, &weight);
  carver.Take(shape_.max_rows * largest, &x);
  carver.Take(shape_.max_rows * outputs, &queries);
  carver.Take(shape_.max_rows * hidden_size, &hidden);
  carver.Take(hidden_size, &norm);
  TANDEM_CUDA_CHECK(FillNoise(weight, weights, 1, Handle(stream)));
  TANDEM_CUDA_CHECK(FillNoise(x, shape_.max_rows * largest, 2, Handle(stream)));
  // Two bfloat16 numbers are a float32 number like the second of them.
  TANDEM_CUDA_CHECK(FillNoise(reinterpret_cast<__nv_bfloat16*>(hidden),
                              2 * shape_.max_rows * hidden_size, 3, Handle(stream)));
  TANDEM_CUDA_CHECK(
      FillNoise(reinterpret_cast<__nv_bfloat16*>(norm), 2 * hidden_size, 4, Handle(stream)));

  for (const size_t inputs : {shape_.q_width, shape_.inner}) {
    AddProjectionArgs add;
    add.x = x;
    add.projection.weight = {Element::kBFloat16, hidden_size, inputs, weight};
    add.next_norm.weight = norm;
    add.hidden = hidden;
    if (shape_.output_bias || shape_.mlp_bias || !HopperTakes(hidden_size, inputs, 0)) continue;
    TimePaths(
        add.projection.weight,
        [&](int rows) {
          add.rows = rows;
          AddProjection(add, stream);
          Scaled(add.hidden, nullptr, add.next_norm, rows, stream);
        },
        stream);
  }
  if (shape_.qk_norm || !HopperTakes(outputs, hidden_size, shape_.head_dim)) return;
  // Rows without a place in the pages.
  TANDEM_CUDA_CHECK(
      cudaMemsetAsync(scratch_.slots, 0xff, shape_.max_rows * sizeof(int64_t), Handle(stream)));
  RaggedBatch batch;
  engine::QkvArgs qkv;
  qkv.batch = &batch;
  qkv.hidden = hidden;
  qkv.norm = {norm, 1e-6f};
  qkv.projection.weight = {Element::kBFloat16, outputs, hidden_size, weight};
  qkv.heads = AsInt(shape_.q_width / shape_.head_dim);
  qkv.pages.kv_heads = AsInt(shape_.kv_width / shape_.head_dim);
  qkv.pages.head_dim = AsInt(shape_.head_dim);
  qkv.queries = queries;
  TimePaths(
      qkv.projection.weight,
      [&](int rows) {
        batch.num_rows = rows;
        scaled_for_ = norm;  // who leaves it is timed above
        Qkv(qkv, stream);
      },
      stream);
}

template <typename Run>
void CudaOps::TimePaths(const PackedMatrix& weight, const Run& run, Stream* stream) {
  cudaEvent_t begin = nullptr, end = nullptr;
  TANDEM_CUDA_CHECK(cudaEventCreate(&begin));
  TANDEM_CUDA_CHECK(cudaEventCreate(&end));
  std::array<bool, kRowBuckets>& wins = library_wins_[{weight.n, weight.k}];
  for (size_t rows = kLibraryRows; rows / 2 < shape_.max_rows; rows *= 2) {
    float best[2] = {};  // milliseconds, of Hopper's kernels and of the library's
    // Several at once, or what is measured of few rows is how fast the host launches.
    const size_t at_once = std::max<size_t>(1, kTimedRows / rows);
    for (int i = 0; i < 2 * kTimings; ++i) {
      wins[BucketOf(rows)] = i % 2 == 1;
      TANDEM_CUDA_CHECK(cudaEventRecord(begin, Handle(stream)));
      for (size_t j = 0; j < at_once; ++j) run(AsInt(std::min(rows, shape_.max_rows)));
      TANDEM_CUDA_CHECK(cudaEventRecord(end, Handle(stream)));
      TANDEM_CUDA_CHECK(cudaEventSynchronize(end));
      float time = 0;
      TANDEM_CUDA_CHECK(cudaEventElapsedTime(&time, begin, end));
      if (i < 2 || time < best[i % 2]) best[i % 2] = time;
    }
    wins[BucketOf(rows)] = best[1] < kClearly * best[0];
  }
  TANDEM_CUDA_CHECK(cudaEventDestroy(begin));
  TANDEM_CUDA_CHECK(cudaEventDestroy(end));
}

bool CudaOps::LibraryWins(const PackedMatrix& weight, int rows) const {
  const auto timed = library_wins_.find({weight.n, weight.k});
  return timed != library_wins_.end() && timed->second[BucketOf(static_cast<size_t>(rows))];
}

void CudaOps::PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                             size_t first_column, void* packed, Stream* stream) {
  device_->Use();
  auto* to = static_cast<uint16_t*>(packed) + first_column * k;
  const size_t count = rows * k, bytes = count * sizeof(uint16_t);
  if (source_element == Element::kBFloat16) {
    TANDEM_CUDA_CHECK(cudaMemcpyAsync(to, source, bytes, cudaMemcpyDefault, Handle(stream)));
    return;
  }
  // Rounded by the calling thread, which others do at the same time; its memory ends here.
  std::vector<uint16_t> rounded(count);
  for (size_t i = 0; i < count; ++i) {
    rounded[i] = FloatToBF16(LoadElement(source, source_element, i));
  }
  TANDEM_CUDA_CHECK(cudaMemcpyAsync(to, rounded.data(), bytes, cudaMemcpyDefault, Handle(stream)));
  stream->Synchronize();
}

// --- weights of 4 bits ---

size_t CudaOps::PackedInt4Bytes(const Int4Shape& shape) const {
  const LaunchOptions launch{nullptr, device_->multiprocessors(), shared_bytes_, overlap_};
  if (!shape_.int4 || !SupportsInt4Linear(1, AsInt(shape.k), launch)) return 0;
  const Int4Layout layout = LayoutOf(shape.pairs, shape.n, shape.k, shape.group_size);
  return layout.ValueBytes() + layout.ScaleBytes();
}

void CudaOps::PackInt4Rows(const Int4Shape& shape, const Int4Rows& rows, void* packed,
                           Stream* stream) {
  device_->Use();
  const Int4Layout layout = LayoutOf(shape.pairs, shape.n, shape.k, shape.group_size);
  auto* data = static_cast<std::byte*>(packed);
  TANDEM_CUDA_CHECK(cuda::PackInt4Rows(layout, rows.values, rows.scales, AsInt(rows.first),
                                       AsInt(rows.rows), data, data + layout.ValueBytes(),
                                       Handle(stream)));
}

const __nv_bfloat16* CudaOps::Ordered(const PackedMatrix& weight, const __nv_bfloat16* x, int rows,
                                      Stream* stream) {
  if (weight.order == nullptr) return x;
  TANDEM_CUDA_CHECK(
      GatherInputs(x, weight.order, rows, AsInt(weight.k), scratch_.ordered, Beside(stream)));
  return scratch_.ordered;
}

Projection CudaOps::Plain(const Projection& projection, Int4Pairs pairs, Stream* stream) {
  if (projection.weight.group_size == 0) return projection;
  const Int4Weight weight = Int4Of(projection.weight, pairs);
  TANDEM_CUDA_CHECK(DequantiseInt4(weight.layout, weight.matrix, projection.weight.order,
                                   scratch_.dequantised, Beside(stream)));
  Projection out = projection;
  out.weight = {Element::kBFloat16, projection.weight.n, projection.weight.k, scratch_.dequantised};
  return out;
}

void CudaOps::FillDummy(uint64_t key, uint64_t first, size_t count, uint16_t* out, Stream* stream) {
  device_->Use();
  TANDEM_CUDA_CHECK(
      FillDummyValues(key, first, count, reinterpret_cast<__nv_bfloat16*>(out), Handle(stream)));
}

// --- norms ---

SquareSums CudaOps::Scaled(const float* hidden, const int32_t* row_ids, const Norm& norm, int rows,
                           Stream* stream) {
  if (row_ids == nullptr && scaled_for_ == norm.weight) return squares_;
  TANDEM_CUDA_CHECK(ScaleRows(hidden, row_ids, norm.weight, rows, AsInt(shape_.hidden),
                              scratch_.scaled, scratch_.shares, Beside(stream)));
  scaled_for_ = row_ids == nullptr ? norm.weight : nullptr;
  squares_ = {scratch_.shares, 1, AsInt(square_stride_)};
  return squares_;
}

const __nv_bfloat16* CudaOps::Normed(const float* hidden, const int32_t* row_ids, const Norm& norm,
                                     int rows, Stream* stream) {
  TANDEM_CUDA_CHECK(RmsNormRows(hidden, row_ids, norm.weight, norm.epsilon, rows,
                                AsInt(shape_.hidden), scratch_.scaled, After(stream)));
  scaled_for_ = nullptr;
  return scratch_.scaled;
}

void CudaOps::Product(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                      const Projection& projection, void* y, Stream* stream) {
  TANDEM_CUDA_CHECK(cublas_ != nullptr
                        ? cublas_->Run(shape, rows, x, WeightOf(projection), y, Handle(stream))
                        : PlainLinear(shape, rows, x, WeightOf(projection), y, Handle(stream)));
}

// --- the beginning of a step ---

void CudaOps::Begin(const BeginArgs& args, Stream* stream) {
  const RaggedBatch& host = *args.host;
  single_rows_ = host.num_items;
  if (host.max_item_rows > 1) {
    single_rows_ = 0;
    for (int i = 0; i < host.num_items; ++i) {
      if (host.first_rows[i + 1] - host.first_rows[i] == 1) ++single_rows_;
    }
  }
  has_decode_items_ = args.embedding_element == Element::kBFloat16;
  if (has_decode_items_) {
    BeginFused(args, stream);
  } else {
    BeginGeneric(args, stream);
  }
  CountWideBlocks(args, stream);
  scaled_for_ = args.next_norm.weight;
  squares_ = {scratch_.shares, 1, AsInt(square_stride_)};
}

void CudaOps::BeginFused(const BeginArgs& args, Stream* stream) {
  const RaggedBatch& batch = *args.batch;
  PrepareStepArgs step;
  step.token_ids = batch.token_ids;
  step.positions = batch.positions;
  step.first_rows = batch.first_rows;
  step.starts = batch.starts;
  step.first_blocks = batch.first_blocks;
  step.blocks = batch.blocks;
  step.drawn = args.drawn;
  step.embedding = BFloat16(args.embedding);
  step.norm_weight = args.next_norm.weight;
  step.frequencies = args.frequencies;
  step.residual = args.hidden;
  step.scaled = scratch_.scaled;
  step.square_shares = scratch_.shares;
  step.cos = scratch_.cos;
  step.sin = scratch_.sin;
  step.slots = scratch_.slots;
  step.decode_items = single_rows_ > 0 ? scratch_.decode_items : nullptr;
  step.rows = batch.num_rows;
  step.items = batch.num_items;
  step.hidden = AsInt(shape_.hidden);
  step.kv_heads = args.pages.kv_heads;
  step.head_dim = args.pages.head_dim;
  step.block_size = args.pages.block_size;
  step.rope_scale = args.rope_scale;
  TANDEM_CUDA_CHECK(PrepareStep(step, Beside(stream)));
}

void CudaOps::CountWideBlocks(const BeginArgs& args, Stream* stream) {
  const RaggedBatch& host = *args.host;
  num_wide_blocks_ = 0;
  if (scratch_.wide_pages == nullptr || args.pages.element != Element::kFloat8E4M3 ||
      host.max_item_rows < kWidenedRows) {
    return;
  }
  const WideRuns runs = {host.first_rows, host.starts, host.num_items, args.pages.block_size};
  size_t blocks = 0;
  for (int i = 0; i < host.num_items; ++i) blocks += static_cast<size_t>(WideBlocksOf(runs, i));
  if (blocks * static_cast<size_t>(args.pages.block_size) > WidePositions()) return;
  num_wide_blocks_ = AsInt(blocks);
  TANDEM_CUDA_CHECK(NumberWideBlocks(
      {args.batch->first_rows, args.batch->starts, args.batch->num_items, args.pages.block_size},
      scratch_.first_wide_blocks, After(stream)));
}

// For an embedding that is not bfloat16.
void CudaOps::BeginGeneric(const BeginArgs& args, Stream* stream) {
  const RaggedBatch& batch = *args.batch;
  BeginStepArgs begin;
  begin.token_ids = batch.token_ids;
  begin.drawn = args.drawn;
  begin.positions = batch.positions;
  begin.first_rows = batch.first_rows;
  begin.starts = batch.starts;
  begin.first_blocks = batch.first_blocks;
  begin.blocks = batch.blocks;
  begin.embedding = args.embedding;
  begin.embedding_kind = args.embedding_element == Element::kFloat32    ? 0
                         : args.embedding_element == Element::kBFloat16 ? 1
                                                                        : 2;
  begin.frequencies = args.frequencies;
  begin.norm_weight = args.next_norm.weight;
  begin.residual = args.hidden;
  begin.scaled = scratch_.scaled;
  begin.squares = scratch_.shares;
  begin.cos = scratch_.cos;
  begin.sin = scratch_.sin;
  begin.slots = scratch_.slots;
  begin.rows = batch.num_rows;
  begin.items = batch.num_items;
  begin.hidden = AsInt(shape_.hidden);
  begin.vocab = AsInt(shape_.vocab);
  begin.kv_heads = args.pages.kv_heads;
  begin.head_dim = args.pages.head_dim;
  begin.block_size = args.pages.block_size;
  begin.rope_scale = args.rope_scale;
  TANDEM_CUDA_CHECK(BeginStep(begin, Beside(stream)));
}

// --- queries, keys, values ---

void CudaOps::Qkv(const engine::QkvArgs& args, Stream* stream) {
  const int rows = args.batch->num_rows;
  const bool plain = args.q_norm == nullptr && args.k_norm == nullptr;
  const bool int4 = plain && Int4Takes(args.projection, rows);
  Path path = plain ? PathOf(rows, AsInt(args.projection.weight.n), AsInt(shape_.hidden),
                             args.pages.head_dim)
                    : Path::kGeneric;
  if (path == Path::kHopper && LibraryWins(args.projection.weight, rows)) path = Path::kGeneric;
  if (path == Path::kGeneric && !int4) return QkvGeneric(args, stream);
  QkvArgs qkv;
  qkv.squares = Scaled(args.hidden, nullptr, args.norm, rows, stream);
  qkv.bias = args.projection.bias;
  qkv.x = scratch_.scaled;
  qkv.q = static_cast<__nv_bfloat16*>(args.queries);
  qkv.kv = args.pages.base;
  qkv.fp8_kv = args.pages.element == Element::kFloat8E4M3;
  qkv.cos = scratch_.cos;
  qkv.sin = scratch_.sin;
  qkv.slots = scratch_.slots;
  qkv.rows = rows;
  qkv.heads = args.heads;
  qkv.kv_heads = args.pages.kv_heads;
  qkv.head_dim = args.pages.head_dim;
  qkv.block_size = args.pages.block_size;
  qkv.inputs = AsInt(shape_.hidden);
  qkv.epsilon = args.norm.epsilon;
  if (int4) {
    qkv.x = Ordered(args.projection.weight, qkv.x, rows, stream);
    TANDEM_CUDA_CHECK((HopperInt4Takes(rows, qkv.inputs) ? HopperInt4Qkv : Int4Qkv)(
        qkv, Int4Of(args.projection.weight, Int4Pairs::kHeads).matrix, scratch_.int4,
        Beside(stream)));
    return;
  }
  qkv.weight = WeightOf(Plain(args.projection, Int4Pairs::kHeads, stream));
  const LaunchOptions launch = ProductLaunch(args.projection, stream);
  TANDEM_CUDA_CHECK(path == Path::kSkinny ? SkinnyQkv(qkv, scratch_.skinny, launch)
                                          : HopperQkv(qkv, scratch_.hopper, launch));
}

void CudaOps::QkvGeneric(const engine::QkvArgs& args, Stream* stream) {
  const int rows = args.batch->num_rows;
  Product(QkvShape(), rows, Normed(args.hidden, nullptr, args.norm, rows, stream),
          Plain(args.projection, Int4Pairs::kHeads, stream), scratch_.qkv, stream);
  FinishQkvArgs finish;
  finish.qkv = scratch_.qkv;
  finish.bias = args.projection.bias;
  finish.q_norm = args.q_norm;
  finish.k_norm = args.k_norm;
  finish.epsilon = args.norm.epsilon;
  finish.cos = scratch_.cos;
  finish.sin = scratch_.sin;
  finish.slots = scratch_.slots;
  finish.q = static_cast<__nv_bfloat16*>(args.queries);
  finish.kv = args.pages.base;
  finish.fp8_kv = args.pages.element == Element::kFloat8E4M3;
  finish.rows = rows;
  finish.heads = args.heads;
  finish.kv_heads = args.pages.kv_heads;
  finish.head_dim = args.pages.head_dim;
  finish.block_size = args.pages.block_size;
  TANDEM_CUDA_CHECK(FinishQkv(finish, Beside(stream)));
}

// --- attention ---

// In a step of both kinds each kernel skips the other's items.
void CudaOps::Attention(const AttentionArgs& args, Stream* stream) {
  const bool decode = DecodeTakes(args, stream);
  if (!decode || single_rows_ < args.batch->num_items) Runs(args, decode, stream);
  if (decode) DecodeRows(args, stream);
}

bool CudaOps::DecodeTakes(const AttentionArgs& args, Stream* stream) const {
  return options_.decode_attention && has_decode_items_ && single_rows_ > 0 &&
         SupportsDecodeAttention(args.batch->num_items, args.heads, args.pages.kv_heads,
                                 args.pages.head_dim, args.pages.block_size, Beside(stream));
}

void CudaOps::DecodeRows(const AttentionArgs& args, Stream* stream) {
  DecodeAttentionArgs decode;
  decode.q = BFloat16(args.queries);
  decode.kv = args.pages.base;
  decode.fp8_kv = args.pages.element == Element::kFloat8E4M3;
  decode.items = scratch_.decode_items;
  decode.blocks = args.batch->blocks;
  decode.out = static_cast<__nv_bfloat16*>(args.out);
  decode.num_items = args.batch->num_items;
  decode.heads = args.heads;
  decode.kv_heads = args.pages.kv_heads;
  decode.head_dim = args.pages.head_dim;
  decode.block_size = args.pages.block_size;
  decode.scale = args.scale;
  TANDEM_CUDA_CHECK(DecodeAttention(decode, scratch_.decode, Beside(stream)));
}

void CudaOps::Runs(const AttentionArgs& args, bool skip_single_rows, Stream* stream) {
  const RaggedBatch& batch = *args.batch;
  if (options_.prefill_attention) {
    PrefillAttentionArgs runs;
    runs.q = BFloat16(args.queries);
    runs.kv = args.pages.base;
    runs.fp8_kv = args.pages.element == Element::kFloat8E4M3;
    runs.first_rows = batch.first_rows;
    runs.starts = batch.starts;
    runs.first_blocks = batch.first_blocks;
    runs.blocks = batch.blocks;
    runs.out = static_cast<__nv_bfloat16*>(args.out);
    runs.partial = scratch_.prefill_partial;
    runs.flags = scratch_.prefill_flags;
    runs.batch_invariant = shape_.batch_invariant;
    runs.num_items = batch.num_items;
    runs.rows = batch.num_rows;
    runs.max_item_rows = batch.max_item_rows;
    runs.max_length = batch.max_length;
    runs.heads = args.heads;
    runs.kv_heads = args.pages.kv_heads;
    runs.head_dim = args.pages.head_dim;
    runs.block_size = args.pages.block_size;
    runs.num_pool_blocks = args.pages.num_blocks;
    runs.skip_single_rows = skip_single_rows;
    runs.scale = args.scale;
    const cudaError_t error = FastRuns(runs, stream);
    if (error == cudaSuccess) return;
    if (error != cudaErrorNotSupported) TANDEM_CUDA_CHECK(error);
  }
  PlainAttentionArgs plain;
  plain.q = BFloat16(args.queries);
  plain.kv = args.pages.base;
  plain.fp8_kv = args.pages.element == Element::kFloat8E4M3;
  plain.first_rows = batch.first_rows;
  plain.starts = batch.starts;
  plain.first_blocks = batch.first_blocks;
  plain.blocks = batch.blocks;
  plain.out = static_cast<__nv_bfloat16*>(args.out);
  plain.rows = batch.num_rows;
  plain.num_items = batch.num_items;
  plain.heads = args.heads;
  plain.kv_heads = args.pages.kv_heads;
  plain.head_dim = args.pages.head_dim;
  plain.block_size = args.pages.block_size;
  plain.skip_single_rows = skip_single_rows;
  plain.scale = args.scale;
  TANDEM_CUDA_CHECK(PlainAttention(plain, Beside(stream)));
}

// The one kernel or the other, with other bits: only where a row's company may count.
cudaError_t CudaOps::FastRuns(const PrefillAttentionArgs& runs, Stream* stream) {
  // Few rows fill FlashInfer's smaller tiles better, and it cuts a long sequence into more parts.
  const bool few_rows = !runs.batch_invariant && runs.rows <= kFewPrefillRows;
  // Items of one row have no wide pages.
  const bool wide = num_wide_blocks_ > 0 && (runs.skip_single_rows || single_rows_ == 0);
  if (!options_.hopper || few_rows || (runs.fp8_kv && !wide)) {
    return FlashPrefillAttention(runs, Beside(stream));
  }
  return HopperPrefillAttention(runs.fp8_kv ? Widened(runs, stream) : runs, Beside(stream));
}

PrefillAttentionArgs CudaOps::Widened(PrefillAttentionArgs runs, Stream* stream) {
  WidenPagesArgs widen;
  widen.kv = runs.kv;
  widen.first_blocks = runs.first_blocks;
  widen.blocks = runs.blocks;
  widen.first_wide_blocks = scratch_.first_wide_blocks;
  widen.wide = scratch_.wide_pages;
  widen.num_items = runs.num_items;
  widen.num_wide_blocks = num_wide_blocks_;
  widen.block_elements = 2 * runs.kv_heads * runs.block_size * runs.head_dim;
  TANDEM_CUDA_CHECK(WidenPages(widen, Beside(stream)));
  runs.kv = scratch_.wide_pages;
  runs.fp8_kv = false;
  runs.first_blocks = scratch_.first_wide_blocks;
  runs.blocks = scratch_.wide_blocks;
  runs.num_pool_blocks = num_wide_blocks_;
  return runs;
}

// --- the residual stream ---

void CudaOps::SelectRows(const SelectRowsArgs& args, Stream* stream) {
  TANDEM_CUDA_CHECK(
      CopyRows(args.from, args.row_ids, args.count, args.row_bytes, args.to, After(stream)));
}

void CudaOps::AddProjection(const AddProjectionArgs& args, Stream* stream) {
  const int outputs = AsInt(shape_.hidden), inputs = AsInt(args.projection.weight.k);
  const bool int4 = args.projection.bias == nullptr && Int4Takes(args.projection, args.rows);
  Path path =
      args.projection.bias == nullptr ? PathOf(args.rows, outputs, inputs, 0) : Path::kGeneric;
  if (path == Path::kHopper && LibraryWins(args.projection.weight, args.rows)) {
    path = Path::kGeneric;
  }
  if (path == Path::kGeneric && !int4) return AddProjectionGeneric(args, stream);
  const bool skinny = path == Path::kSkinny;
  ResidualArgs residual;
  residual.x = BFloat16(args.x);
  residual.residual = args.hidden;
  residual.norm_weight = args.next_norm.weight;
  residual.scaled = scratch_.scaled;
  residual.square_shares = scratch_.shares;
  residual.square_stride = skinny || int4 ? kMaxSkinnyRows : AsInt(square_stride_);
  residual.rows = args.rows;
  residual.outputs = outputs;
  residual.inputs = inputs;
  if (int4) {
    const Int4Matrix matrix = Int4Of(args.projection.weight, Int4Pairs::kRows).matrix;
    residual.x = Ordered(args.projection.weight, residual.x, args.rows, stream);
    const bool hopper = HopperInt4Takes(args.rows, inputs);
    TANDEM_CUDA_CHECK((hopper ? HopperInt4Residual : Int4Residual)(residual, matrix, scratch_.int4,
                                                                   Beside(stream)));
    const int parts =
        (hopper ? HopperInt4SquareParts : Int4SquareParts)(matrix, args.rows, Beside(stream));
    LeaveNorm(args, {scratch_.shares, parts, residual.square_stride});
    return;
  }
  residual.weight = WeightOf(Plain(args.projection, Int4Pairs::kRows, stream));
  const LaunchOptions launch = ProductLaunch(args.projection, stream);
  TANDEM_CUDA_CHECK(skinny ? SkinnyResidual(residual, scratch_.skinny, launch)
                           : HopperResidual(residual, scratch_.hopper, launch));
  const int parts = skinny ? ResidualSquareParts(args.rows, outputs, inputs, Beside(stream))
                           : HopperSquareParts(outputs);
  LeaveNorm(args, {scratch_.shares, parts, residual.square_stride});
}

void CudaOps::LeaveNorm(const AddProjectionArgs& args, const SquareSums& squares) {
  scaled_for_ = shape_.ranks == 1 ? args.next_norm.weight : nullptr;
  squares_ = squares;
}

void CudaOps::AddProjectionGeneric(const AddProjectionArgs& args, Stream* stream) {
  scaled_for_ = nullptr;
  Product(AddShape(args.projection.weight.k), args.rows, BFloat16(args.x),
          Plain(args.projection, Int4Pairs::kRows, stream), args.hidden, stream);
  if (args.projection.bias == nullptr) return;
  TANDEM_CUDA_CHECK(AddBiasRows(args.hidden, args.projection.bias, args.rows, AsInt(shape_.hidden),
                                After(stream)));
}

// --- the feed-forward block ---

void CudaOps::GateUp(const engine::GateUpArgs& args, Stream* stream) {
  const int inner = AsInt(shape_.inner), inputs = AsInt(shape_.hidden);
  const Path path =
      args.projection.bias == nullptr ? PathOf(args.rows, inner, inputs, 0) : Path::kGeneric;
  const bool int4 = args.projection.bias == nullptr && Int4Takes(args.projection, args.rows);
  if (path == Path::kGeneric && !int4) return GateUpGeneric(args, stream);
  GateUpArgs gate_up;
  gate_up.squares = Scaled(args.hidden, nullptr, args.norm, args.rows, stream);
  gate_up.x = scratch_.scaled;
  gate_up.out = static_cast<__nv_bfloat16*>(args.out);
  gate_up.rows = args.rows;
  gate_up.inner = inner;
  gate_up.inputs = inputs;
  gate_up.epsilon = args.norm.epsilon;
  if (int4) {
    gate_up.x = Ordered(args.projection.weight, gate_up.x, args.rows, stream);
    TANDEM_CUDA_CHECK((HopperInt4Takes(args.rows, inputs) ? HopperInt4GateUp : Int4GateUp)(
        gate_up, Int4Of(args.projection.weight, Int4Pairs::kHalves).matrix, scratch_.int4,
        Beside(stream)));
    return;
  }
  gate_up.weight = WeightOf(Plain(args.projection, Int4Pairs::kHalves, stream));
  const LaunchOptions launch = ProductLaunch(args.projection, stream);
  TANDEM_CUDA_CHECK(path == Path::kSkinny ? SkinnyGateUp(gate_up, scratch_.skinny, launch)
                                          : HopperGateUp(gate_up, scratch_.hopper, launch));
}

void CudaOps::GateUpGeneric(const engine::GateUpArgs& args, Stream* stream) {
  const size_t rows = static_cast<size_t>(args.rows);
  auto* out = static_cast<__nv_bfloat16*>(args.out);
  const __nv_bfloat16* normed = Normed(args.hidden, nullptr, args.norm, args.rows, stream);
  const Projection projection = Plain(args.projection, Int4Pairs::kHalves, stream);
  for (size_t r = 0; r < rows; r += mlp_tile_) {
    const int count = AsInt(std::min(mlp_tile_, rows - r));
    Product(GateUpShape(), count, normed + r * shape_.hidden, projection, scratch_.gate_up, stream);
    TANDEM_CUDA_CHECK(SiluMulRows(scratch_.gate_up, args.projection.bias, count,
                                  AsInt(shape_.inner), out + r * shape_.inner, After(stream)));
  }
}

// --- the end of a step ---

void CudaOps::Logits(const engine::LogitsArgs& args, Stream* stream) {
  const int vocab = AsInt(shape_.vocab), inputs = AsInt(shape_.hidden);
  const Path path =
      args.projection.bias == nullptr ? PathOf(args.count, vocab, inputs, 0) : Path::kGeneric;
  if (path != Path::kGeneric) {
    // The sums of squares that products left are in another order than those of selected rows, and
    // a sequence's company decides which it is.
    if (shape_.batch_invariant) scaled_for_ = nullptr;
    LogitsArgs logits;
    logits.squares = Scaled(args.hidden, args.row_ids, args.norm, args.count, stream);
    logits.weight = WeightOf(args.projection);
    logits.x = scratch_.scaled;
    logits.logits = args.logits;
    logits.rows = args.count;
    logits.vocab = vocab;
    logits.inputs = inputs;
    logits.epsilon = args.norm.epsilon;
    TANDEM_CUDA_CHECK(path == Path::kSkinny
                          ? SkinnyLogits(logits, scratch_.skinny, Beside(stream))
                          : HopperLogits(logits, LogitsScratch(), Beside(stream)));
    return;
  }
  Product(LogitsShape(), args.count,
          Normed(args.hidden, args.row_ids, args.norm, args.count, stream), args.projection,
          args.logits, stream);
  if (args.projection.bias == nullptr) return;
  TANDEM_CUDA_CHECK(
      AddBiasRows(args.logits, args.projection.bias, args.count, vocab, After(stream)));
}

void CudaOps::Sample(const SampleArgs& args, Stream* stream) {
  TANDEM_CUDA_CHECK(SampleRows(args, AsInt(shape_.vocab), AsInt(shape_.max_logit_rows),
                               scratch_.sample, Beside(stream)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const OpsShape& shape, CudaDevice* device,
                                                 const CudaOpsOptions& options) {
  if (shape.element != Element::kBFloat16) {
    return absl::UnimplementedError(
        "GPUs compute in bfloat16 only: give --dtype=bfloat16 or auto, or --device=cpu");
  }
  device->Use();
  auto ops = std::make_unique<CudaOps>(shape, device, options);
  absl::Status status = ops->Prepare();
  if (!status.ok()) return status;
  return ops;
}

}  // namespace tandem::engine::cuda
