#include "engine/model/model_weights.h"

#include <set>
#include <string_view>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "engine/device/cpu/threads.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/model_digest.h"

namespace tandem::engine {
namespace {

// Models whose loading is worth a line of log now and then.
constexpr size_t kLargeModelBytes = size_t{1} << 30;

// Gives tensors by name, from a checkpoint or made up.
class TensorSource {
 public:
  TensorSource(const Checkpoint* checkpoint, uint64_t seed, Threads* threads)
      : checkpoint_(checkpoint), seed_(seed), threads_(threads) {
    if (!Has(prefix_ + "embed_tokens.weight") && Has("embed_tokens.weight")) prefix_.clear();
  }

  // What begins the names of all tensors but the head's.
  const std::string& prefix() const { return prefix_; }

  // Valid until the next Get.
  absl::StatusOr<TensorView> Get(const std::string& name, const std::vector<int64_t>& shape) {
    used_.insert(name);
    if (checkpoint_ == nullptr) return Dummy(name, shape, &scratch_);
    TANDEM_ASSIGN_OR_RETURN(TensorView view, checkpoint_->Get(name));
    if (view.shape != shape) {
      return InvalidArgument("tensor \"{}\" has shape {}, config.json implies {}", name,
                             ShapeText(view.shape), ShapeText(shape));
    }
    return view;
  }

  TensorView Dummy(const std::string& name, const std::vector<int64_t>& shape,
                   MemoryBlock* memory) {
    size_t count = 1;
    for (const int64_t dimension : shape) count *= static_cast<size_t>(dimension);
    if (memory->size() < count * 2) *memory = MemoryBlock(count * 2);
    uint16_t* values = static_cast<uint16_t*>(memory->data());
    FillDummyTensor(name, seed_, {values, count}, threads_);
    return {Element::kBFloat16, shape, static_cast<const std::byte*>(memory->data()), count * 2};
  }

  bool Has(const std::string& name) const {
    return checkpoint_ == nullptr ||
           checkpoint_->Get(name).status().code() != absl::StatusCode::kNotFound;
  }
  void Ignore(const std::string& name) { used_.insert(name); }

  // An error that names a tensor nobody asked for.
  absl::Status CheckAllUsed(const std::string& architecture) const {
    if (checkpoint_ == nullptr) return absl::OkStatus();
    for (const std::string& name : checkpoint_->Names()) {
      if (used_.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
      return InvalidArgument("tensor \"{}\" is not part of the {} that config.json describes", name,
                             architecture);
    }
    return absl::OkStatus();
  }

 private:
  const Checkpoint* checkpoint_;  // null: dummy
  const uint64_t seed_;
  Threads* threads_;
  MemoryBlock scratch_;
  std::string prefix_ = "model.";
  std::set<std::string> used_;
};

// Loads tensors into a ModelWeights.
class Loader {
 public:
  Loader(const ModelConfig& config, Element element, TensorSource* source, Device* device, Ops* ops)
      : config_(config),
        element_(element),
        source_(source),
        device_(device),
        ops_(ops),
        stream_(device->NewStream()) {}

  absl::Status Vector(const std::string& name, int64_t size, VectorWeights* out) {
    return Vectors({{name, size}}, out);
  }

  // Several matrices with the same input, side by side; or several vectors end to end.
  struct Part {
    std::string name;  // of a matrix: without ".weight"
    int64_t columns;
  };
  absl::Status Vectors(const std::vector<Part>& parts, VectorWeights* out) {
    std::vector<float> values;
    for (const Part& part : parts) {
      TANDEM_ASSIGN_OR_RETURN(const TensorView view, source_->Get(part.name, {part.columns}));
      for (size_t i = 0; i < static_cast<size_t>(part.columns); ++i) {
        values.push_back(LoadElement(view.data, view.element, i));
      }
    }
    TANDEM_ASSIGN_OR_RETURN(out->memory, CopyOf(values.data(), values.size() * sizeof(float)));
    return absl::OkStatus();
  }

  absl::StatusOr<Buffer> CopyOf(const void* data, size_t bytes) {
    TANDEM_ASSIGN_OR_RETURN(Buffer copy, device_->Allocate(bytes));
    stream_->CopyToDevice(copy.data(), data, bytes);
    stream_->Synchronize();
    return copy;
  }

  absl::Status Matrix(const std::vector<Part>& parts, int64_t inputs, bool bias,
                      LinearWeights* out) {
    size_t columns = 0;
    for (const Part& part : parts) columns += static_cast<size_t>(part.columns);
    TANDEM_RETURN_IF_ERROR(Allocate(columns, inputs, out));
    size_t first = 0;
    for (const Part& part : parts) {
      TANDEM_ASSIGN_OR_RETURN(const TensorView view,
                              source_->Get(part.name + ".weight", {part.columns, inputs}));
      Pack(view, first, out);
      first += static_cast<size_t>(part.columns);
    }
    if (!bias) return absl::OkStatus();
    std::vector<Part> biases;
    for (const Part& part : parts) biases.push_back({part.name + ".bias", part.columns});
    return Vectors(biases, &out->bias);
  }

  absl::Status Allocate(size_t columns, int64_t inputs, LinearWeights* out) {
    const size_t k = static_cast<size_t>(inputs);
    TANDEM_ASSIGN_OR_RETURN(out->memory, device_->Allocate(ops_->PackedWeightBytes(columns, k)));
    out->matrix = {element_, columns, k, out->memory.data()};
    return absl::OkStatus();
  }
  void Pack(const TensorView& view, size_t first_column, LinearWeights* out) {
    ops_->PackWeightRows(view.data, view.element, static_cast<size_t>(view.shape[0]), out->matrix.k,
                         first_column, out->memory.data());
  }

  absl::Status Layer(int index, LayerWeights* layer) {
    const int64_t hidden = config_.hidden_size, inner = config_.intermediate_size;
    const int64_t q = int64_t{config_.num_heads} * config_.head_dim;
    const int64_t kv = int64_t{config_.num_kv_heads} * config_.head_dim;
    const std::string prefix = fmt::format("{}layers.{}.", source_->prefix(), index);
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    TANDEM_RETURN_IF_ERROR(Vector(prefix + "input_layernorm.weight", hidden, &layer->input_norm));
    TANDEM_RETURN_IF_ERROR(
        Matrix({{attention + "q_proj", q}, {attention + "k_proj", kv}, {attention + "v_proj", kv}},
               hidden, config_.qkv_bias, &layer->qkv));
    if (config_.qk_norm) {
      const int64_t head_dim = config_.head_dim;
      TANDEM_RETURN_IF_ERROR(Vector(attention + "q_norm.weight", head_dim, &layer->q_norm));
      TANDEM_RETURN_IF_ERROR(Vector(attention + "k_norm.weight", head_dim, &layer->k_norm));
    }
    TANDEM_RETURN_IF_ERROR(
        Matrix({{attention + "o_proj", hidden}}, q, config_.output_bias, &layer->output));
    TANDEM_RETURN_IF_ERROR(
        Vector(prefix + "post_attention_layernorm.weight", hidden, &layer->post_attention_norm));
    TANDEM_RETURN_IF_ERROR(Matrix({{mlp + "gate_proj", inner}, {mlp + "up_proj", inner}}, hidden,
                                  config_.mlp_bias, &layer->gate_up));
    return Matrix({{mlp + "down_proj", hidden}}, inner, config_.mlp_bias, &layer->down);
  }

 private:
  const ModelConfig& config_;
  const Element element_;
  TensorSource* source_;
  Device* device_;
  Ops* ops_;
  const std::unique_ptr<Stream> stream_;
};

absl::Status LoadEmbeddingAndHead(const ModelConfig& config, bool dummy, bool copy_embedding,
                                  TensorSource* source, Loader* loader, ModelWeights* weights) {
  const std::string table = source->prefix() + "embed_tokens.weight", head = "lm_head";
  const std::vector<int64_t> shape = {config.vocab_size, config.hidden_size};
  if (dummy) {
    weights->embedding = source->Dummy(table, shape, &weights->dummy_embedding);
  } else {
    TANDEM_ASSIGN_OR_RETURN(weights->embedding, source->Get(table, shape));
  }
  if (copy_embedding) {
    TANDEM_ASSIGN_OR_RETURN(weights->embedding_copy,
                            loader->CopyOf(weights->embedding.data, weights->embedding.bytes));
  }
  if (!config.tie_word_embeddings) {
    if (!source->Has(head + ".weight")) {
      return InvalidArgument(
          "tensor \"{}.weight\" is missing; if the embedding serves as the head, config.json must "
          "say "
          "\"tie_word_embeddings\": true",
          head);
    }
    return loader->Matrix({{head, config.vocab_size}}, config.hidden_size, false, &weights->head);
  }
  source->Ignore(head + ".weight");  // some tied checkpoints store the copy
  TANDEM_RETURN_IF_ERROR(
      loader->Allocate(static_cast<size_t>(config.vocab_size), config.hidden_size, &weights->head));
  loader->Pack(weights->embedding, 0, &weights->head);
  return absl::OkStatus();
}

absl::Status LoadAll(const ModelConfig& config, const LoadOptions& options, TensorSource* source,
                     Device* device, Ops* ops, ModelWeights* weights) {
  Loader loader(config, options.element, source, device, ops);
  const size_t total_bytes =
      static_cast<size_t>(config.NumParameters()) * ElementSize(options.element);
  const int log_every = std::max(1, config.num_layers / 10);
  weights->layers.resize(static_cast<size_t>(config.num_layers));
  for (int i = 0; i < config.num_layers; ++i) {
    TANDEM_RETURN_IF_ERROR(loader.Layer(i, &weights->layers[static_cast<size_t>(i)]));
    if (total_bytes >= kLargeModelBytes && (i + 1) % log_every == 0) {
      spdlog::info("loading {}: layer {} of {}", options.model_dir, i + 1, config.num_layers);
    }
  }
  TANDEM_RETURN_IF_ERROR(
      loader.Vector(source->prefix() + "norm.weight", config.hidden_size, &weights->final_norm));
  TANDEM_RETURN_IF_ERROR(LoadEmbeddingAndHead(config, options.dummy, !device->shares_host_memory(),
                                              source, &loader, weights));
  return source->CheckAllUsed(config.architecture);
}

}  // namespace

size_t ModelWeights::PackedBytes() const {
  size_t total = head.memory.size();
  total += embedding_copy.size() > 0 ? embedding_copy.size() : dummy_embedding.size();
  for (const LayerWeights& layer : layers) {
    total += layer.qkv.memory.size() + layer.output.memory.size() + layer.gate_up.memory.size() +
             layer.down.memory.size();
  }
  return total;
}

absl::StatusOr<ModelWeights> LoadModelWeights(const ModelConfig& config, const LoadOptions& options,
                                              Device* device, Ops* ops) {
  ModelWeights weights;
  if (options.dummy) {
    TANDEM_ASSIGN_OR_RETURN(weights.digest, DummyDigest(options.model_dir, options.seed));
  } else {
    TANDEM_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(options.model_dir));
    weights.checkpoint = std::make_unique<Checkpoint>(std::move(checkpoint));
    TANDEM_ASSIGN_OR_RETURN(weights.digest,
                            CheckpointDigest(options.model_dir, *weights.checkpoint));
  }
  Threads threads(!options.dummy            ? 1
                  : options.num_threads > 0 ? options.num_threads
                                            : PhysicalCores());
  TensorSource source(weights.checkpoint.get(), options.seed, &threads);
  const absl::Status status = LoadAll(config, options, &source, device, ops, &weights);
  if (!status.ok()) {
    return InvalidArgument("{}: {}", options.model_dir, MessageOf(status));
  }
  return weights;
}

}  // namespace tandem::engine
