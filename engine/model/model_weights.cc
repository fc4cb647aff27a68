#include "engine/model/model_weights.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/block_hash.h"
#include "common/base/model_digest.h"
#include "common/base/status.h"
#include "engine/device/cpu/threads.h"
#include "engine/kernels/dummy_value.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/fp8_weights.h"
#include "engine/model/load_progress.h"
#include "engine/model/quantised_linear.h"
#include "engine/model/shared_weights.h"
#include "engine/model/weight_stager.h"

namespace tandem::engine {
namespace {

// Threads that read a checkpoint: some together reach what a disk, or the kernel's cache of it, can
// do.
constexpr int kMaxReaders = 12;
// Of the device, where dummy weights are made before they are packed.
constexpr size_t kDummyScratchBytes = size_t{64} << 20;
constexpr size_t kDummyInt4Rows = 512;
// Of the host, dequantised before they are packed.
constexpr size_t kDequantisedFloats = size_t{4} << 20;

// Gives tensors by name, from a checkpoint or made up.
class TensorSource {
 public:
  TensorSource(const Checkpoint* checkpoint,
               const std::optional<CheckpointQuantisation>& quantisation,
               const LoadOptions& options, Threads* threads)
      : checkpoint_(checkpoint),
        quantisation_(quantisation),
        padding_(options.padding),
        shard_(options.shard),
        fp8_(options.fp8),
        seed_(options.seed),
        threads_(threads) {
    if (!Has(prefix_ + "embed_tokens.weight") && Has("embed_tokens.weight")) prefix_.clear();
  }

  // What begins the names of all tensors but the head's.
  const std::string& prefix() const { return prefix_; }

  // Valid until the next Get.
  absl::StatusOr<TensorView> Get(const std::string& name, std::vector<int64_t> shape) {
    const std::optional<size_t> split = shard_.whole() ? std::nullopt : ShardedDimension(name);
    if (split.has_value()) shape[*split] *= shard_.size;
    TANDEM_ASSIGN_OR_RETURN(TensorView view, GetPadded(name, std::move(shape)));
    // Whole rows, so that all ranks have the scales of the whole model.
    if (fp8_ && IsFp8Weight(name)) view = RoundToFp8(view, threads_, &rounded_);
    return split.has_value() ? ShardOf(view, *split, shard_, &part_) : view;
  }
  // Whether another rank has a tensor for all.
  bool IsAnothers(const std::string& name) {
    if (shard_.rank == 0 || !BelongsToTheFirstRank(name)) return false;
    used_.insert(name);
    return true;
  }

  // Whether a linear layer has 4-bit weights; then instead of Get.
  bool IsQuantised(const std::string& layer) const {
    return quantisation_.has_value() && checkpoint_ != nullptr &&
           checkpoint_->Has(layer + ".qweight");
  }
  absl::StatusOr<QuantisedLinear> GetQuantised(const std::string& layer, int64_t outputs,
                                               int64_t inputs) {
    for (const std::string& name : QuantisedLinear::TensorNames(layer)) used_.insert(name);
    return QuantisedLinear::Open(*checkpoint_, layer, *quantisation_, outputs, inputs);
  }
  const Shard& shard() const { return shard_; }
  Threads& threads() { return *threads_; }

  // Of bfloat16, as all dummies.
  static size_t DummyBytes(const std::vector<int64_t>& shape) {
    size_t bytes = sizeof(uint16_t);
    for (const int64_t dimension : shape) bytes *= static_cast<size_t>(dimension);
    return bytes;
  }
  static TensorView DummyView(const std::vector<int64_t>& shape, const void* data) {
    return {Element::kBFloat16, shape, static_cast<const std::byte*>(data), DummyBytes(shape)};
  }
  void MakeDummy(const std::string& name, std::span<uint16_t> values) {
    FillDummyTensor(name, seed_, values, threads_);
  }

  size_t TotalBytes(const ModelConfig& config) const {
    if (checkpoint_ != nullptr) return checkpoint_->TotalBytes();
    return static_cast<size_t>(config.NumParameters()) * sizeof(uint16_t);
  }
  bool dummy() const { return checkpoint_ == nullptr; }
  uint64_t DummyKeyOf(const std::string& name) {
    used_.insert(name);
    return DummyKey(name, seed_);
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
      if (IsEmptyBias(name)) continue;
      return InvalidArgument("tensor \"{}\" is not part of the {} that config.json describes", name,
                             architecture);
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<TensorView> GetPadded(const std::string& name, std::vector<int64_t> shape) {
    const std::optional<size_t> heads =
        padding_.adds_heads() ? QueryHeadDimension(name) : std::nullopt;
    if (!heads.has_value()) return GetStored(name, shape);
    shape[*heads] = int64_t{padding_.groups} * padding_.heads * padding_.head_dim;
    TANDEM_ASSIGN_OR_RETURN(const TensorView view, GetStored(name, shape));
    return PadHeads(view, *heads, padding_, &padded_);
  }
  absl::StatusOr<TensorView> GetStored(const std::string& name, const std::vector<int64_t>& shape) {
    used_.insert(name);
    if (checkpoint_ == nullptr) {
      const size_t bytes = DummyBytes(shape);
      if (scratch_.size() < bytes) scratch_ = MemoryBlock(bytes);
      MakeDummy(name, {static_cast<uint16_t*>(scratch_.data()), bytes / sizeof(uint16_t)});
      return DummyView(shape, scratch_.data());
    }
    TANDEM_RETURN_IF_ERROR(CheckPlain(name));
    TANDEM_ASSIGN_OR_RETURN(TensorView view, checkpoint_->Get(name));
    if (view.shape != shape) {
      return InvalidArgument("tensor \"{}\" has shape {}, config.json implies {}", name,
                             ShapeText(view.shape), ShapeText(shape));
    }
    return view;
  }
  // An error where the weights of a layer are there, but quantised.
  absl::Status CheckPlain(std::string_view name) const {
    const std::string quantised = LayerOf(name, ".weight") + ".qweight";
    if (checkpoint_->Has(name) || !checkpoint_->Has(quantised)) return absl::OkStatus();
    return InvalidArgument(
        "tensor \"{}\" is quantised, and neither quantization_config in config.json nor "
        "quantize_config.json says how",
        quantised);
  }
  // Tools give every quantised layer a bias, of zeros where the model has none.
  bool IsEmptyBias(std::string_view name) const {
    if (!IsQuantised(LayerOf(name, ".bias"))) return false;
    const absl::StatusOr<TensorView> bias = checkpoint_->Get(name);
    if (!bias.ok()) return false;
    for (size_t i = 0; i < bias->bytes / ElementSize(bias->element); ++i) {
      if (LoadElement(bias->data, bias->element, i) != 0) return false;
    }
    return true;
  }
  // "" where the tensor is another.
  static std::string LayerOf(std::string_view name, std::string_view suffix) {
    if (!name.ends_with(suffix)) return "";
    return std::string(name.substr(0, name.size() - suffix.size()));
  }

  const Checkpoint* checkpoint_;  // null: dummy
  const std::optional<CheckpointQuantisation> quantisation_;
  const HeadPadding padding_;
  const Shard shard_;
  const bool fp8_;
  const uint64_t seed_;
  Threads* threads_;
  MemoryBlock scratch_;
  MemoryBlock padded_, rounded_, part_;
  std::string prefix_ = "model.";
  std::set<std::string> used_;
};

// Loads tensors into a ModelWeights.
class Loader {
 public:
  Loader(const ModelConfig& config, Element element, TensorSource* source, Device* device, Ops* ops,
         WeightArena* arena, LoadProgress* progress)
      : config_(config),
        element_(element),
        source_(source),
        device_(device),
        ops_(ops),
        arena_(arena),
        progress_(progress),
        stream_(device->NewStream()),
        stager_(device, ops),
        makes_dummies_(source->dummy() && ops->fills_dummies()) {}

  ~Loader() { stream_->Synchronize(); }

  bool makes_dummies() const { return makes_dummies_; }
  // Whether memory comes with its weights.
  bool filled() const { return arena_ != nullptr && arena_->filled(); }
  // Memory for weights that the device reads.
  absl::StatusOr<Buffer> NewMemory(const std::string& name, size_t bytes) {
    return arena_ != nullptr ? arena_->Take(name, bytes) : device_->Allocate(bytes);
  }
  // Whether products read a table of the device as it is.
  bool CanBeRead(const TensorView& table) const {
    return ops_->packs_plain_rows() && table.element == Element::kBFloat16;
  }

  // What was announced is in memory of the device when it returns.
  absl::Status Finish() {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    TANDEM_RETURN_IF_ERROR(stager_.Run(std::min(cores, kMaxReaders), progress_));
    stream_->Synchronize();
    return absl::OkStatus();
  }

  absl::Status Vector(const std::string& name, int64_t size, VectorWeights* out) {
    return Vectors({{name, size}}, out);
  }

  // Several matrices with the same input, side by side; or several vectors end to end.
  struct Part {
    std::string name;  // of a matrix: without ".weight"
    int64_t columns;
  };
  absl::Status Vectors(const std::vector<Part>& parts, VectorWeights* out) {
    size_t size = 0;
    for (const Part& part : parts) size += static_cast<size_t>(part.columns);
    TANDEM_ASSIGN_OR_RETURN(out->memory, NewMemory(parts.front().name, size * sizeof(float)));
    if (filled()) return absl::OkStatus();
    std::vector<float> values;
    for (const Part& part : parts) {
      TANDEM_ASSIGN_OR_RETURN(const TensorView view, source_->Get(part.name, {part.columns}));
      for (size_t i = 0; i < static_cast<size_t>(part.columns); ++i) {
        values.push_back(LoadElement(view.data, view.element, i));
      }
    }
    stream_->CopyToDevice(out->memory.data(), values.data(), size * sizeof(float));
    stream_->Synchronize();
    return absl::OkStatus();
  }

  // The embedding table in memory of the device.
  absl::StatusOr<Buffer> Table(const std::string& name, const TensorView& view) {
    TANDEM_ASSIGN_OR_RETURN(Buffer table, device_->Allocate(view.bytes));
    if (makes_dummies_) {
      ops_->FillDummy(source_->DummyKeyOf(name), 0, view.bytes / sizeof(uint16_t),
                      table.as<uint16_t>(), stream_.get());
      progress_->Add(view.bytes);
    } else if (view.file != nullptr) {
      stager_.Copy(view, table.data());
    } else {
      stream_->CopyToDevice(table.data(), view.data, view.bytes);
      stream_->Synchronize();
    }
    return table;
  }

  // `pairs`: of the matrix's columns, which matter where weights stay of 4 bits.
  absl::Status Matrix(const std::vector<Part>& parts, int64_t inputs, Int4Pairs pairs, bool bias,
                      LinearWeights* out) {
    size_t columns = 0;
    for (const Part& part : parts) columns += static_cast<size_t>(part.columns);
    TANDEM_ASSIGN_OR_RETURN(const bool packed, PackInt4(parts, columns, inputs, pairs, out));
    if (!packed) TANDEM_RETURN_IF_ERROR(PackParts(parts, columns, inputs, out));
    if (!bias || source_->IsAnothers(parts.front().name + ".bias")) return absl::OkStatus();
    std::vector<Part> biases;
    for (const Part& part : parts) biases.push_back({part.name + ".bias", part.columns});
    return Vectors(biases, &out->bias);
  }

  // The output head, whose product reads no 4-bit weights.
  absl::Status Head(const Part& part, int64_t inputs, LinearWeights* out) {
    return PackParts({part}, static_cast<size_t>(part.columns), inputs, out);
  }

  // In the device's own form of `element`.
  absl::Status PackParts(const std::vector<Part>& parts, size_t columns, int64_t inputs,
                         LinearWeights* out) {
    TANDEM_RETURN_IF_ERROR(Allocate(parts.front().name + ".weight", columns, inputs, out));
    size_t first = 0;
    for (const Part& part : parts) {
      if (!filled() && source_->IsQuantised(part.name)) {
        TANDEM_RETURN_IF_ERROR(PackQuantised(part, inputs, first, out));
      } else {
        TANDEM_RETURN_IF_ERROR(Pack(part.name + ".weight", {part.columns, inputs}, first, out));
      }
      first += static_cast<size_t>(part.columns);
    }
    return absl::OkStatus();
  }

  // Whether the parts could stay of 4 bits: all are, in the same groups, and the device reads them.
  absl::StatusOr<bool> PackInt4(const std::vector<Part>& parts, size_t columns, int64_t inputs,
                                Int4Pairs pairs, LinearWeights* out) {
    // A rank's part is dequantised: it need not be whole groups, nor its inputs in their order.
    if (device_->shares_host_memory() || !source_->shard().whole()) return false;
    if (makes_dummies_) return PackDummyInt4(parts, columns, inputs, pairs, out);
    for (const Part& part : parts) {
      if (!source_->IsQuantised(part.name)) return false;
    }
    std::vector<QuantisedLinear> linears;
    std::optional<std::vector<int32_t>> order;
    for (const Part& part : parts) {
      TANDEM_ASSIGN_OR_RETURN(QuantisedLinear linear,
                              source_->GetQuantised(part.name, part.columns, inputs));
      std::optional<std::vector<int32_t>> own = linear.Order();
      if (!own.has_value() || (order.has_value() && *order != *own)) return false;
      order = std::move(own);
      linears.push_back(std::move(linear));
    }
    const Int4Shape shape{pairs, columns, static_cast<size_t>(inputs), linears[0].group_size()};
    const size_t bytes = ops_->PackedInt4Bytes(shape);
    if (bytes == 0) return false;
    TANDEM_ASSIGN_OR_RETURN(out->memory, NewMemory(parts.front().name + ".weight", bytes));
    out->matrix = {element_, shape.n, shape.k, out->memory.data(), shape.group_size};
    if (!order->empty()) {
      const size_t order_bytes = order->size() * sizeof(int32_t);
      TANDEM_ASSIGN_OR_RETURN(out->order, device_->Allocate(order_bytes));
      stream_->CopyToDevice(out->order.data(), order->data(), order_bytes);
      stream_->Synchronize();
      out->matrix.order = out->order.as<const int32_t>();
    }
    size_t first = 0;
    for (QuantisedLinear& linear : linears) {
      const size_t rows = linear.outputs();
      stager_.PackInt4(std::move(linear), shape, *order, first, out->memory.data());
      first += rows;
    }
    return true;
  }

  // Dummies of a config that says 4 bits: symmetric, without order. Rows repeat, for the host makes
  // them.
  absl::StatusOr<bool> PackDummyInt4(const std::vector<Part>& parts, size_t columns, int64_t inputs,
                                     Int4Pairs pairs, LinearWeights* out) {
    if (!config_.quantisation.has_value()) return false;
    const auto k = static_cast<size_t>(inputs);
    const int group = config_.quantisation->group_size;
    const Int4Shape shape{pairs, columns, k, group < 0 ? k : static_cast<size_t>(group)};
    const size_t bytes = ops_->PackedInt4Bytes(shape);
    if (bytes == 0) return false;
    const std::string name = parts.front().name + ".weight";
    TANDEM_ASSIGN_OR_RETURN(out->memory, NewMemory(name, bytes));
    out->matrix = {element_, shape.n, shape.k, out->memory.data(), shape.group_size};
    for (const Part& part : parts) source_->DummyKeyOf(part.name + ".weight");
    const uint64_t key = source_->DummyKeyOf(name);
    // A uniform value of 4 bits has a standard deviation of 4.6: the weights' is that of other
    // dummies, 0.02.
    constexpr float kScale = 0.02f / 4.6f;
    const size_t rows = std::min(columns, kDummyInt4Rows);
    const size_t words = rows * shape.words(), groups = rows * shape.groups();
    std::vector<uint32_t> values(words + groups, ScaleWord(kScale, 8));
    for (size_t i = 0; i < words; ++i) values[i] = static_cast<uint32_t>(DummyMix(key + i));
    TANDEM_ASSIGN_OR_RETURN(Buffer block, device_->Allocate(values.size() * sizeof(uint32_t)));
    stream_->CopyToDevice(block.data(), values.data(), values.size() * sizeof(uint32_t));
    for (size_t first = 0; first < columns; first += rows) {
      const Int4Rows part{block.as<uint32_t>(), block.as<uint32_t>() + words, first,
                          std::min(rows, columns - first)};
      ops_->PackInt4Rows(shape, part, out->memory.data(), stream_.get());
    }
    stream_->Synchronize();
    progress_->Add(columns * k * sizeof(uint16_t));
    return true;
  }

  absl::Status Allocate(const std::string& name, size_t columns, int64_t inputs,
                        LinearWeights* out) {
    const size_t k = static_cast<size_t>(inputs);
    TANDEM_ASSIGN_OR_RETURN(out->memory, NewMemory(name, ops_->PackedWeightBytes(columns, k)));
    out->matrix = {element_, columns, k, out->memory.data()};
    return absl::OkStatus();
  }
  absl::Status Pack(const std::string& name, const std::vector<int64_t>& shape, size_t first_column,
                    LinearWeights* out) {
    if (filled()) return absl::OkStatus();
    if (makes_dummies_) return PackDummy(name, shape, first_column, out);
    TANDEM_ASSIGN_OR_RETURN(const TensorView view, source_->Get(name, shape));
    Pack(view, first_column, out);
    return absl::OkStatus();
  }
  // Later, by several threads, where the device has to be given the bytes; else at once.
  void Pack(const TensorView& view, size_t first_column, LinearWeights* out) {
    if (filled()) return;
    if (view.file != nullptr && !device_->shares_host_memory()) {
      stager_.Pack(view, first_column, out->memory.data());
      return;
    }
    ops_->PackWeightRows(view.data, view.element, static_cast<size_t>(view.shape[0]), out->matrix.k,
                         first_column, out->memory.data(), stream_.get());
    // A dummy's memory is used again for the next.
    if (device_->asynchronous()) stream_->Synchronize();
    progress_->Add(view.bytes);
  }
  // Dequantised.
  absl::Status PackQuantised(const Part& part, int64_t inputs, size_t first_column,
                             LinearWeights* out) {
    const Shard& shard = source_->shard();
    const std::optional<size_t> split =
        shard.whole() ? std::nullopt : ShardedDimension(part.name + ".weight");
    const bool rows_split = split == 0u, columns_split = split == 1u;
    TANDEM_ASSIGN_OR_RETURN(
        QuantisedLinear linear,
        source_->GetQuantised(part.name, part.columns * (rows_split ? shard.size : 1),
                              inputs * (columns_split ? shard.size : 1)));
    if (!device_->shares_host_memory() && shard.whole()) {
      stager_.Pack(std::move(linear), first_column, out->memory.data());
      return absl::OkStatus();
    }
    const auto rows = static_cast<size_t>(part.columns), k = static_cast<size_t>(inputs);
    const size_t whole = linear.inputs(), rank = static_cast<size_t>(shard.rank);
    const size_t first_row = rows_split ? rank * rows : 0,
                 first_input = columns_split ? rank * k : 0;
    const size_t step = std::clamp<size_t>(kDequantisedFloats / whole, 1, rows);
    std::vector<float> values(step * whole);
    for (size_t row = 0; row < rows; row += step) {
      const size_t count = std::min(step, rows - row);
      source_->threads().ForRanges(count, 1, [&](size_t begin, size_t end) {
        linear.Dequantise(first_row + row + begin, end - begin, values.data() + begin * whole);
      });
      for (size_t i = 0; columns_split && i < count; ++i) {
        std::memmove(values.data() + i * k, values.data() + i * whole + first_input,
                     k * sizeof(float));
      }
      ops_->PackWeightRows(values.data(), Element::kFloat32, count, k, first_column + row,
                           out->memory.data(), stream_.get());
      if (device_->asynchronous()) stream_->Synchronize();  // the values are used again
    }
    progress_->Add(linear.Bytes());
    return absl::OkStatus();
  }
  absl::Status PackDummy(const std::string& name, const std::vector<int64_t>& shape,
                         size_t first_column, LinearWeights* out) {
    const auto rows = static_cast<size_t>(shape[0]), k = static_cast<size_t>(shape[1]);
    const size_t row_bytes = k * sizeof(uint16_t);
    if (dummy_scratch_.size() < row_bytes) {
      TANDEM_ASSIGN_OR_RETURN(dummy_scratch_,
                              device_->Allocate(std::max(row_bytes, kDummyScratchBytes)));
    }
    const uint64_t key = source_->DummyKeyOf(name);
    const size_t step = dummy_scratch_.size() / row_bytes;
    for (size_t row = 0; row < rows; row += step) {
      const size_t count = std::min(step, rows - row);
      auto* values = dummy_scratch_.as<uint16_t>();
      ops_->FillDummy(key, row * k, count * k, values, stream_.get());
      ops_->PackWeightRows(values, Element::kBFloat16, count, k, first_column + row,
                           out->memory.data(), stream_.get());
    }
    progress_->Add(rows * row_bytes);
    return absl::OkStatus();
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
               hidden, Int4Pairs::kHeads, config_.qkv_bias, &layer->qkv));
    if (config_.qk_norm) {
      const int64_t head_dim = config_.head_dim;
      TANDEM_RETURN_IF_ERROR(Vector(attention + "q_norm.weight", head_dim, &layer->q_norm));
      TANDEM_RETURN_IF_ERROR(Vector(attention + "k_norm.weight", head_dim, &layer->k_norm));
    }
    TANDEM_RETURN_IF_ERROR(Matrix({{attention + "o_proj", hidden}}, q, Int4Pairs::kRows,
                                  config_.output_bias, &layer->output));
    TANDEM_RETURN_IF_ERROR(
        Vector(prefix + "post_attention_layernorm.weight", hidden, &layer->post_attention_norm));
    TANDEM_RETURN_IF_ERROR(Matrix({{mlp + "gate_proj", inner}, {mlp + "up_proj", inner}}, hidden,
                                  Int4Pairs::kHalves, config_.mlp_bias, &layer->gate_up));
    return Matrix({{mlp + "down_proj", hidden}}, inner, Int4Pairs::kRows, config_.mlp_bias,
                  &layer->down);
  }

 private:
  const ModelConfig& config_;
  const Element element_;
  TensorSource* source_;
  Device* device_;
  Ops* ops_;
  WeightArena* const arena_;  // null: the device's own memory
  LoadProgress* progress_;
  const std::unique_ptr<Stream> stream_;
  WeightStager stager_;
  const bool makes_dummies_;  // on the device
  Buffer dummy_scratch_;
};

absl::Status LoadEmbeddingAndHead(const ModelConfig& config, bool copy_embedding,
                                  TensorSource* source, Loader* loader, ModelWeights* weights) {
  const std::string table = source->prefix() + "embed_tokens.weight", head = "lm_head";
  const std::vector<int64_t> shape = {config.vocab_size, config.hidden_size};
  if (loader->makes_dummies()) {
    const auto count = static_cast<size_t>(shape[0] * shape[1]);
    weights->embedding = {Element::kBFloat16, shape, nullptr, count * sizeof(uint16_t), nullptr};
  } else if (source->dummy()) {
    const size_t bytes = TensorSource::DummyBytes(shape);
    TANDEM_ASSIGN_OR_RETURN(weights->dummy_embedding, loader->NewMemory(table, bytes));
    auto* values = weights->dummy_embedding.as<uint16_t>();
    if (!loader->filled()) source->MakeDummy(table, {values, bytes / sizeof(uint16_t)});
    weights->embedding = TensorSource::DummyView(shape, values);
  } else {
    TANDEM_ASSIGN_OR_RETURN(weights->embedding, source->Get(table, shape));
  }
  if (copy_embedding) {
    TANDEM_ASSIGN_OR_RETURN(weights->embedding_copy, loader->Table(table, weights->embedding));
  }
  if (!config.tie_word_embeddings) {
    if (!source->Has(head + ".weight") && !source->IsQuantised(head)) {
      return InvalidArgument(
          "tensor \"{}.weight\" is missing; if the embedding serves as the head, config.json must "
          "say "
          "\"tie_word_embeddings\": true",
          head);
    }
    return loader->Head({head, config.vocab_size}, config.hidden_size, &weights->head);
  }
  source->Ignore(head + ".weight");  // some tied checkpoints store the copy
  if (copy_embedding && loader->CanBeRead(weights->embedding)) {
    weights->head.matrix = {Element::kBFloat16, static_cast<size_t>(config.vocab_size),
                            static_cast<size_t>(config.hidden_size),
                            weights->embedding_copy.data()};
    return absl::OkStatus();
  }
  TANDEM_RETURN_IF_ERROR(loader->Allocate(head + ".weight", static_cast<size_t>(config.vocab_size),
                                          config.hidden_size, &weights->head));
  if (loader->makes_dummies()) return loader->Pack(table, shape, 0, &weights->head);
  loader->Pack(weights->embedding, 0, &weights->head);
  return absl::OkStatus();
}

absl::Status LoadAll(const ModelConfig& config, const LoadOptions& options, TensorSource* source,
                     Device* device, Ops* ops, WeightArena* arena, ModelWeights* weights) {
  const size_t total_bytes = source->TotalBytes(config);
  LoadProgress progress("loading " + options.model_dir, total_bytes, options.report);
  Loader loader(config, options.element, source, device, ops, arena, &progress);
  weights->layers.resize(static_cast<size_t>(config.num_layers));
  for (int i = 0; i < config.num_layers; ++i) {
    TANDEM_RETURN_IF_ERROR(loader.Layer(i, &weights->layers[static_cast<size_t>(i)]));
  }
  TANDEM_RETURN_IF_ERROR(
      loader.Vector(source->prefix() + "norm.weight", config.hidden_size, &weights->final_norm));
  TANDEM_RETURN_IF_ERROR(
      LoadEmbeddingAndHead(config, !device->shares_host_memory(), source, &loader, weights));
  if (!loader.filled()) TANDEM_RETURN_IF_ERROR(source->CheckAllUsed(config.architecture));
  TANDEM_RETURN_IF_ERROR(loader.Finish());
  if (loader.filled()) progress.Add(total_bytes);
  progress.Finish();
  return absl::OkStatus();
}

// How this release, on this processor, packs weights: a hash of a small matrix in packed form, so
// that a change of the form cannot be forgotten.
absl::StatusOr<std::string> PackingDigest(Device* device, Ops* ops) {
  constexpr size_t kSide = 72;  // more than a panel and a tile, and a multiple of neither
  std::vector<uint16_t> values(kSide * kSide);
  for (size_t i = 0; i < values.size(); ++i) values[i] = FloatToBF16(static_cast<float>(i));
  const size_t bytes = ops->PackedWeightBytes(kSide, kSide);
  TANDEM_ASSIGN_OR_RETURN(const Buffer packed, device->Allocate(bytes));
  const std::unique_ptr<Stream> stream = device->NewStream();
  ops->PackWeightRows(values.data(), Element::kBFloat16, kSide, kSide, 0, packed.data(),
                      stream.get());
  stream->Synchronize();
  return HashBytes({packed.as<const char>(), bytes}).ToHex();
}

// Names packed weights: equal only where the bytes are. The model's digest samples its files; what
// changes them while processes share their weights changes their times too.
absl::StatusOr<std::string> SharedKey(const LoadOptions& options, const ModelWeights& weights,
                                      Device* device, Ops* ops) {
  TANDEM_ASSIGN_OR_RETURN(std::string key, PackingDigest(device, ops));
  key += fmt::format(" {} {} {} {} {}/{}", weights.digest, static_cast<int>(options.element),
                     options.fp8, options.padding.padded, options.shard.rank, options.shard.size);
  if (weights.checkpoint == nullptr) return key;
  for (const Checkpoint::File& file : weights.checkpoint->files()) {
    std::error_code error;
    const auto written = std::filesystem::last_write_time(file.path, error);
    key += fmt::format(" {}:{}", file.path, written.time_since_epoch().count());
  }
  return key;
}

// UNAVAILABLE where the memory to share does not serve.
absl::Status LoadShared(const ModelConfig& config, const LoadOptions& options, TensorSource* source,
                        Device* device, Ops* ops, ModelWeights* weights) {
  TANDEM_ASSIGN_OR_RETURN(const std::string key, SharedKey(options, *weights, device, ops));
  const auto fill = [&](WeightArena* arena) {
    ModelWeights written;
    return LoadAll(config, options, source, device, ops, arena, &written);
  };
  const auto use = [&](WeightArena* arena) {
    return LoadAll(config, options, source, device, ops, arena, weights);
  };
  return UseSharedWeights(options.shared_memory, key, fill, use);
}

// In memory to share, where there is any that serves.
absl::Status Load(const ModelConfig& config, const LoadOptions& options, TensorSource* source,
                  Device* device, Ops* ops, ModelWeights* weights) {
  if (!options.shared_memory.empty() && device->shares_host_memory()) {
    const absl::Status status = LoadShared(config, options, source, device, ops, weights);
    if (!absl::IsUnavailable(status)) return status;
    spdlog::warn(
        "a copy of the weights for this worker alone: the memory to share ({}) does not "
        "serve: {}",
        options.shared_memory, MessageOf(status));
    weights->layers.clear();
  }
  return LoadAll(config, options, source, device, ops, nullptr, weights);
}

void WarnOfSize(const ModelConfig& config, const LoadOptions& options,
                const ModelWeights& weights) {
  const auto kept = [](const LinearWeights& linear) { return linear.matrix.group_size != 0; };
  for (const LayerWeights& layer : weights.layers) {
    if (kept(layer.qkv) && kept(layer.output) && kept(layer.gate_up) && kept(layer.down)) continue;
    spdlog::warn(
        "{}: weights ({}) were dequantised to {}: they take {:.1f} MB, not the files' {:.1f}",
        options.model_dir, config.quantisation->Describe(),
        options.element == Element::kFloat32 ? "float32" : "bfloat16",
        static_cast<double>(weights.PackedBytes()) / 1e6,
        static_cast<double>(weights.checkpoint->TotalBytes()) / 1e6);
    return;
  }
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
    TANDEM_ASSIGN_OR_RETURN(weights.digest, CheckpointDigest(options.model_dir));
  }
  const bool computed = options.dummy || options.fp8 || config.quantisation.has_value();
  Threads threads(!computed ? 1 : options.num_threads > 0 ? options.num_threads : PhysicalCores());
  TensorSource source(weights.checkpoint.get(), config.quantisation, options, &threads);
  const absl::Status status = Load(config, options, &source, device, ops, &weights);
  if (status.ok()) {
    if (config.quantisation.has_value() && !options.dummy) WarnOfSize(config, options, weights);
    return weights;
  }
  const std::string message = fmt::format("{}: {}", options.model_dir, MessageOf(status));
  // Whatever else is wrong is wrong with the checkpoint.
  if (absl::IsResourceExhausted(status)) return absl::ResourceExhaustedError(message);
  return absl::InvalidArgumentError(message);
}

}  // namespace tandem::engine
