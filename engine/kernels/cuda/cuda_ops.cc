#include "engine/kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <string>
#include <utility>
#include <vector>

#include "engine/device/cuda/cuda_check.h"
#include "engine/kernels/cuda/cublas_linear.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/plain_attention.h"
#include "engine/kernels/cuda/sample.h"

namespace tandem::engine::cuda {
namespace {

// Rows of the feed-forward block computed together by the generic kernels: enough that the products
// run at full speed, few enough that both halves of them need little memory.
constexpr size_t kMlpTile = 2048;
constexpr size_t kAlignment = 256;  // bytes

int AsInt(size_t value) { return static_cast<int>(value); }

const __nv_bfloat16* BFloat16(const void* data) { return static_cast<const __nv_bfloat16*>(data); }

// Deals out parts of one allocation; with no base it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  void Take(size_t count, T** out) {
    *out = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

class CudaOps final : public Ops {
 public:
  CudaOps(const OpsShape& shape, CudaDevice* device) : shape_(shape), device_(device) {}

  absl::Status Prepare();

  Element activation() const override { return Element::kBFloat16; }
  size_t PackedWeightBytes(size_t n, size_t k) const override { return n * k * sizeof(uint16_t); }
  void PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                      size_t first_column, void* packed) override;

  void Begin(const BeginArgs& args, Stream* stream) override;
  void Qkv(const engine::QkvArgs& args, Stream* stream) override;
  void Attention(const AttentionArgs& args, Stream* stream) override;
  void AddProjection(const AddProjectionArgs& args, Stream* stream) override;
  void GateUp(const engine::GateUpArgs& args, Stream* stream) override;
  void Logits(const engine::LogitsArgs& args, Stream* stream) override;
  void Sample(const SampleArgs& args, Stream* stream) override;

 private:
  // What a step's ops share, and the generic kernels' intermediate results.
  struct Scratch {
    float* cos = nullptr;  // [max_rows][head_dim / 2], of the step, as the next three
    float* sin = nullptr;
    int64_t* slots = nullptr;          // [max_rows]
    int32_t* row_items = nullptr;      // [max_rows]
    __nv_bfloat16* normed = nullptr;   // [max(max_rows, max_logit_rows)][hidden]
    float* qkv = nullptr;              // [max_rows][q_width + 2 * kv_width]
    __nv_bfloat16* gate_up = nullptr;  // [mlp_tile][2 * inner]
    std::byte* workspace = nullptr;    // of cuBLAS
    std::byte* sample = nullptr;       // of SampleRows
  };
  size_t Carve(std::byte* base);

  ProductShape QkvShape() const {
    return {AsInt(shape_.q_width + 2 * shape_.kv_width), AsInt(shape_.hidden),
            ProductOutput::kFloat32};
  }
  ProductShape GateUpShape() const {
    return {AsInt(2 * shape_.inner), AsInt(shape_.hidden), ProductOutput::kBFloat16};
  }
  ProductShape AddShape(size_t inputs) const {
    return {AsInt(shape_.hidden), AsInt(inputs), ProductOutput::kAddFloat32};
  }
  ProductShape LogitsShape() const {
    return {AsInt(shape_.vocab), AsInt(shape_.hidden), ProductOutput::kFloat32};
  }
  absl::Status TimeProducts();

  cudaStream_t Handle(Stream* stream) const { return static_cast<CudaStream*>(stream)->handle(); }
  LaunchOptions Options(Stream* stream) const {
    return {Handle(stream), device_->multiprocessors(), false};
  }

  const OpsShape shape_;
  CudaDevice* const device_;
  size_t mlp_tile_ = 0;  // rows
  Buffer memory_;        // holds what `scratch_` points to
  Scratch scratch_;
  std::unique_ptr<CublasLinear> cublas_;
};

size_t CudaOps::Carve(std::byte* base) {
  mlp_tile_ = std::min(shape_.max_rows, kMlpTile);
  Carver carver(base);
  const size_t half = shape_.head_dim / 2;
  carver.Take(shape_.max_rows * half, &scratch_.cos);
  carver.Take(shape_.max_rows * half, &scratch_.sin);
  carver.Take(shape_.max_rows, &scratch_.slots);
  carver.Take(shape_.max_rows, &scratch_.row_items);
  carver.Take(std::max(shape_.max_rows, shape_.max_logit_rows) * shape_.hidden, &scratch_.normed);
  carver.Take(shape_.max_rows * (shape_.q_width + 2 * shape_.kv_width), &scratch_.qkv);
  carver.Take(mlp_tile_ * 2 * shape_.inner, &scratch_.gate_up);
  carver.Take(CublasLinear::kWorkspaceBytes, &scratch_.workspace);
  carver.Take(SampleScratchBytes(AsInt(shape_.max_logit_rows), AsInt(shape_.vocab)),
              &scratch_.sample);
  return carver.used();
}

absl::Status CudaOps::Prepare() {
  absl::StatusOr<Buffer> memory = device_->Allocate(Carve(nullptr));
  if (!memory.ok()) return memory.status();
  memory_ = *std::move(memory);
  Carve(memory_.as<std::byte>());
  absl::StatusOr<std::unique_ptr<CublasLinear>> cublas =
      CublasLinear::Create(scratch_.workspace, false);
  if (!cublas.ok()) return cublas.status();
  cublas_ = *std::move(cublas);
  return TimeProducts();
}

absl::Status CudaOps::TimeProducts() {
  const std::pair<ProductShape, size_t> products[] = {{QkvShape(), shape_.max_rows},
                                                      {AddShape(shape_.q_width), shape_.max_rows},
                                                      {GateUpShape(), mlp_tile_},
                                                      {AddShape(shape_.inner), shape_.max_rows},
                                                      {LogitsShape(), shape_.max_logit_rows}};
  size_t bytes = 0;
  for (const auto& [product, rows] : products) {
    bytes = std::max(bytes, CublasLinear::PrepareBytes(product, AsInt(rows)));
  }
  // Given back before the weights come.
  absl::StatusOr<Buffer> scratch = device_->Allocate(bytes);
  if (!scratch.ok()) return scratch.status();
  const std::unique_ptr<Stream> stream = device_->NewStream();
  for (const auto& [product, rows] : products) {
    const absl::Status status =
        cublas_->Prepare(product, AsInt(rows), scratch->data(), Handle(stream.get()));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

void CudaOps::PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                             size_t first_column, void* packed) {
  auto* to = static_cast<uint16_t*>(packed) + first_column * k;
  const size_t count = rows * k, bytes = count * sizeof(uint16_t);
  if (source_element == Element::kBFloat16) {
    TANDEM_CUDA_CHECK(cudaMemcpy(to, source, bytes, cudaMemcpyHostToDevice));
    return;
  }
  std::vector<uint16_t> rounded(count);
  for (size_t i = 0; i < count; ++i)
    rounded[i] = FloatToBF16(LoadElement(source, source_element, i));
  TANDEM_CUDA_CHECK(cudaMemcpy(to, rounded.data(), bytes, cudaMemcpyHostToDevice));
}

void CudaOps::Begin(const BeginArgs& args, Stream* stream) {
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
  begin.cos = scratch_.cos;
  begin.sin = scratch_.sin;
  begin.slots = scratch_.slots;
  begin.row_items = scratch_.row_items;
  begin.rows = batch.num_rows;
  begin.items = batch.num_items;
  begin.hidden = AsInt(shape_.hidden);
  begin.vocab = AsInt(shape_.vocab);
  begin.kv_heads = args.pages.kv_heads;
  begin.head_dim = args.pages.head_dim;
  begin.block_size = args.pages.block_size;
  begin.rope_scale = args.rope_scale;
  TANDEM_CUDA_CHECK(BeginStep(begin, Options(stream)));
}

void CudaOps::Qkv(const engine::QkvArgs& args, Stream* stream) {
  const int rows = args.batch->num_rows;
  TANDEM_CUDA_CHECK(RmsNormRows(args.hidden, nullptr, args.norm.weight, args.norm.epsilon, rows,
                                AsInt(shape_.hidden), scratch_.normed, Options(stream)));
  TANDEM_CUDA_CHECK(cublas_->Run(QkvShape(), rows, scratch_.normed,
                                 BFloat16(args.projection.weight.data), scratch_.qkv,
                                 Handle(stream)));
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
  finish.kv = reinterpret_cast<__nv_bfloat16*>(args.pages.base);
  finish.rows = rows;
  finish.heads = args.heads;
  finish.kv_heads = args.pages.kv_heads;
  finish.head_dim = args.pages.head_dim;
  finish.block_size = args.pages.block_size;
  TANDEM_CUDA_CHECK(FinishQkv(finish, Options(stream)));
}

void CudaOps::Attention(const AttentionArgs& args, Stream* stream) {
  const RaggedBatch& batch = *args.batch;
  PlainAttentionArgs plain;
  plain.q = BFloat16(args.queries);
  plain.kv = reinterpret_cast<const __nv_bfloat16*>(args.pages.base);
  plain.row_items = scratch_.row_items;
  plain.first_rows = batch.first_rows;
  plain.starts = batch.starts;
  plain.first_blocks = batch.first_blocks;
  plain.blocks = batch.blocks;
  plain.out = static_cast<__nv_bfloat16*>(args.out);
  plain.rows = batch.num_rows;
  plain.heads = args.heads;
  plain.kv_heads = args.pages.kv_heads;
  plain.head_dim = args.pages.head_dim;
  plain.block_size = args.pages.block_size;
  plain.scale = args.scale;
  TANDEM_CUDA_CHECK(PlainAttention(plain, Options(stream)));
}

void CudaOps::AddProjection(const AddProjectionArgs& args, Stream* stream) {
  TANDEM_CUDA_CHECK(cublas_->Run(AddShape(args.projection.weight.k), args.rows, BFloat16(args.x),
                                 BFloat16(args.projection.weight.data), args.hidden,
                                 Handle(stream)));
  if (args.projection.bias == nullptr) return;
  TANDEM_CUDA_CHECK(AddBiasRows(args.hidden, args.projection.bias, args.rows, AsInt(shape_.hidden),
                                Options(stream)));
}

void CudaOps::GateUp(const engine::GateUpArgs& args, Stream* stream) {
  const size_t rows = static_cast<size_t>(args.rows);
  auto* out = static_cast<__nv_bfloat16*>(args.out);
  TANDEM_CUDA_CHECK(RmsNormRows(args.hidden, nullptr, args.norm.weight, args.norm.epsilon,
                                args.rows, AsInt(shape_.hidden), scratch_.normed, Options(stream)));
  for (size_t r = 0; r < rows; r += mlp_tile_) {
    const int count = AsInt(std::min(mlp_tile_, rows - r));
    TANDEM_CUDA_CHECK(cublas_->Run(GateUpShape(), count, scratch_.normed + r * shape_.hidden,
                                   BFloat16(args.projection.weight.data), scratch_.gate_up,
                                   Handle(stream)));
    TANDEM_CUDA_CHECK(SiluMulRows(scratch_.gate_up, args.projection.bias, count,
                                  AsInt(shape_.inner), out + r * shape_.inner, Options(stream)));
  }
}

void CudaOps::Logits(const engine::LogitsArgs& args, Stream* stream) {
  TANDEM_CUDA_CHECK(RmsNormRows(args.hidden, args.row_ids, args.norm.weight, args.norm.epsilon,
                                args.count, AsInt(shape_.hidden), scratch_.normed,
                                Options(stream)));
  TANDEM_CUDA_CHECK(cublas_->Run(LogitsShape(), args.count, scratch_.normed,
                                 BFloat16(args.projection.weight.data), args.logits,
                                 Handle(stream)));
  if (args.projection.bias == nullptr) return;
  TANDEM_CUDA_CHECK(AddBiasRows(args.logits, args.projection.bias, args.count, AsInt(shape_.vocab),
                                Options(stream)));
}

void CudaOps::Sample(const SampleArgs& args, Stream* stream) {
  TANDEM_CUDA_CHECK(SampleRows(args, AsInt(shape_.vocab), AsInt(shape_.max_logit_rows),
                               scratch_.sample, Options(stream)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const OpsShape& shape, CudaDevice* device) {
  if (shape.element != Element::kBFloat16) {
    return absl::UnimplementedError(
        "GPUs compute in bfloat16 only: give --dtype=bfloat16 or auto, or --device=cpu");
  }
  device->Use();
  auto ops = std::make_unique<CudaOps>(shape, device);
  absl::Status status = ops->Prepare();
  if (!status.ok()) return status;
  return ops;
}

}  // namespace tandem::engine::cuda
