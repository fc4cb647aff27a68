#include "engine/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/base/status.h"
#include "engine/model/rope_of.h"

namespace tandem::engine {
namespace {

Element ElementOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Element::kFloat32;
    case DType::kBFloat16:
      return Element::kBFloat16;
    case DType::kFloat16:
      return Element::kFloat16;
    case DType::kFloat8E4M3:
      return Element::kFloat8E4M3;
  }
  return Element::kFloat32;
}

}  // namespace

OpsShape OpsShapeOf(const ModelConfig& config, Element element, const DecoderLimits& limits) {
  OpsShape shape;
  shape.element = element;
  shape.max_rows = static_cast<size_t>(limits.max_rows);
  shape.max_items = static_cast<size_t>(limits.max_items);
  shape.max_logit_rows = static_cast<size_t>(limits.max_logit_rows);
  shape.hidden = static_cast<size_t>(config.hidden_size);
  shape.head_dim = static_cast<size_t>(config.head_dim);
  shape.q_width = static_cast<size_t>(config.num_heads) * shape.head_dim;
  shape.kv_width = static_cast<size_t>(config.num_kv_heads) * shape.head_dim;
  shape.inner = static_cast<size_t>(config.intermediate_size);
  shape.vocab = static_cast<size_t>(config.vocab_size);
  shape.qk_norm = config.qk_norm;
  shape.output_bias = config.output_bias;
  shape.mlp_bias = config.mlp_bias;
  shape.int4 = config.quantisation.has_value();
  return shape;
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(ModelConfig config, ModelWeights weights,
                                                         const DecoderLimits& limits,
                                                         Device* device, Ops* ops,
                                                         Collective* collective) {
  std::unique_ptr<Decoder> decoder(
      new Decoder(std::move(config), std::move(weights), ops, collective));
  TANDEM_RETURN_IF_ERROR(decoder->Allocate(limits, device));
  return decoder;
}

size_t Decoder::WorkspaceBytes(const ModelConfig& config, Element activation,
                               const DecoderLimits& limits) {
  const OpsShape shape = OpsShapeOf(config, Element::kFloat32, limits);
  const size_t activations = 2 * shape.q_width + 2 * shape.kv_width + shape.inner;
  return shape.max_rows * (shape.hidden * sizeof(float) + activations * ElementSize(activation)) +
         shape.max_logit_rows * shape.hidden * sizeof(float);
}

absl::Status Decoder::Allocate(const DecoderLimits& limits, Device* device) {
  const OpsShape shape = OpsShapeOf(config_, Element::kFloat32, limits);
  const size_t rows = shape.max_rows, element = ElementSize(ops_->activation());
  TANDEM_ASSIGN_OR_RETURN(hidden_, device->Allocate(rows * shape.hidden * sizeof(float)));
  TANDEM_ASSIGN_OR_RETURN(queries_,
                          device->Allocate(rows * (shape.q_width + 2 * shape.kv_width) * element));
  TANDEM_ASSIGN_OR_RETURN(attended_, device->Allocate(rows * shape.q_width * element));
  TANDEM_ASSIGN_OR_RETURN(inner_, device->Allocate(rows * shape.inner * element));
  TANDEM_ASSIGN_OR_RETURN(wanted_,
                          device->Allocate(shape.max_logit_rows * shape.hidden * sizeof(float)));
  const ModelRope rope = RopeOf(config_);
  rope_scale_ = rope.scale;
  const size_t bytes = rope.frequencies.size() * sizeof(float);
  TANDEM_ASSIGN_OR_RETURN(frequencies_, device->Allocate(bytes));
  const std::unique_ptr<Stream> stream = device->NewStream();
  stream->CopyToDevice(frequencies_.data(), rope.frequencies.data(), bytes);
  stream->Synchronize();
  if (collective_ == nullptr) return absl::OkStatus();
  return collective_->Prepare(device, std::max(rows, shape.max_logit_rows) * shape.hidden);
}

Norm Decoder::NormOf(const VectorWeights& weight) const {
  return {weight.data(), config_.rms_norm_eps};
}

void Decoder::Attention(const ForwardInput& input, const KvPages& pages, Stream* stream) {
  AttentionArgs attention;
  attention.batch = input.batch;
  attention.queries = queries_.data();
  attention.pages = pages;
  attention.heads = config_.num_heads;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  attention.out = attended_.data();
  ops_->Attention(attention, stream);
}

Decoder::Rows Decoder::Select(const ForwardInput& input, const Rows& all, Stream* stream) {
  SelectRowsArgs select;
  select.row_ids = input.wanted;
  select.count = input.num_wanted;
  select.from = all.attended;
  select.row_bytes = static_cast<size_t>(config_.num_heads) *
                     static_cast<size_t>(config_.head_dim) * ElementSize(ops_->activation());
  select.to = queries_.data();  // which attention has read
  ops_->SelectRows(select, stream);
  select.from = all.hidden;
  select.row_bytes = static_cast<size_t>(config_.hidden_size) * sizeof(float);
  select.to = wanted_.data();
  ops_->SelectRows(select, stream);
  return {wanted_.as<float>(), queries_.data(), input.num_wanted};
}

void Decoder::FinishLayer(const LayerWeights& layer, const Norm& next_norm, const Rows& rows,
                          Stream* stream) {
  AddProjectionArgs output;
  output.rows = rows.count;
  output.x = rows.attended;
  output.projection = layer.output.projection();
  output.next_norm = NormOf(layer.post_attention_norm);
  output.hidden = rows.hidden;
  AddProjection(output, stream);
  GateUpArgs gate_up;
  gate_up.rows = rows.count;
  gate_up.hidden = rows.hidden;
  gate_up.norm = NormOf(layer.post_attention_norm);
  gate_up.projection = layer.gate_up.projection();
  gate_up.out = inner_.data();
  ops_->GateUp(gate_up, stream);
  AddProjectionArgs down;
  down.rows = rows.count;
  down.x = inner_.data();
  down.projection = layer.down.projection();
  down.next_norm = next_norm;
  down.hidden = rows.hidden;
  AddProjection(down, stream);
}

void Decoder::AddProjection(const AddProjectionArgs& args, Stream* stream) {
  if (collective_ == nullptr) return ops_->AddProjection(args, stream);
  const size_t count = static_cast<size_t>(args.rows) * static_cast<size_t>(config_.hidden_size);
  AddProjectionArgs part = args;
  part.hidden = collective_->BeginSum(args.hidden, count, stream);
  ops_->AddProjection(part, stream);
  collective_->EndSum(args.hidden, count, stream);
}

void Decoder::Forward(const ForwardInput& input, const KvRegion& kv, Stream* stream) {
  if (input.batch->num_rows == 0) return;
  KvPages pages{kv.base,
                ElementOf(kv.layout.dtype),
                kv.layout.num_kv_heads,
                kv.layout.head_dim,
                kv.layout.block_size,
                kv.num_blocks};
  BeginArgs begin;
  begin.batch = input.batch;
  begin.host = input.host;
  begin.drawn = input.drawn;
  begin.embedding = weights_.embedding_data();
  begin.embedding_element = weights_.embedding.element;
  begin.frequencies = frequencies_.as<float>();
  begin.rope_scale = rope_scale_;
  begin.pages = pages;
  begin.next_norm = NormOf(weights_.layers.front().input_norm);
  begin.hidden = hidden_.as<float>();
  ops_->Begin(begin, stream);
  const size_t num_layers = weights_.layers.size();
  for (size_t i = 0; i < num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[i];
    const bool last = i + 1 == num_layers;
    pages.base = kv.Block(static_cast<int>(i), 0);
    QkvArgs qkv;
    qkv.batch = input.batch;
    qkv.hidden = hidden_.as<float>();
    qkv.norm = NormOf(layer.input_norm);
    qkv.projection = layer.qkv.projection();
    qkv.q_norm = layer.q_norm.data();
    qkv.k_norm = layer.k_norm.data();
    qkv.heads = config_.num_heads;
    qkv.pages = pages;
    qkv.queries = queries_.data();
    ops_->Qkv(qkv, stream);
    if (!input.layer_ready.empty()) stream->Record(input.layer_ready[i].get());
    // Nothing reads the last layer's output if nobody wants logits.
    if (last && !input.need_hidden) return;
    Attention(input, pages, stream);
    Rows rows{hidden_.as<float>(), attended_.data(), input.batch->num_rows};
    selected_ = last && input.wanted != nullptr && input.num_wanted < rows.count;
    if (selected_) rows = Select(input, rows, stream);
    const VectorWeights& next = last ? weights_.final_norm : weights_.layers[i + 1].input_norm;
    FinishLayer(layer, NormOf(next), rows, stream);
    layers_done_.fetch_add(1, std::memory_order_relaxed);
  }
}

void Decoder::Logits(const int32_t* row_ids, int count, float* out, Stream* stream) {
  LogitsArgs args;
  args.hidden = selected_ ? wanted_.as<float>() : hidden_.as<float>();
  args.row_ids = selected_ ? nullptr : row_ids;
  args.count = count;
  args.norm = NormOf(weights_.final_norm);
  args.projection = weights_.head.projection();
  args.logits = out;
  ops_->Logits(args, stream);
}

}  // namespace tandem::engine
