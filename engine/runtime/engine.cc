#include "engine/runtime/engine.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "spdlog/spdlog.h"

#include "common/base/checkpoint_quantisation.h"
#include "common/base/not_quantised.h"
#include "common/base/status.h"
#include "common/config/bytes.h"
#include "common/config/dtype_choices.h"
#include "engine/device/cpu/threads.h"
#include "engine/model/decoder.h"
#include "engine/model/padded_heads.h"
#include "engine/model/shared_weights.h"
#include "engine/model/tokenizer_size.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/decoder_runner.h"
#include "engine/runtime/memory_plan.h"
#include "engine/runtime/paced_runner.h"
#include "engine/runtime/tensor_parallel.h"

namespace tandem::engine {
namespace {

// Of the memory available, for a KV pool whose size nobody gave: several workers may start at once.
constexpr double kDefaultMemoryShare = 0.2;
// Of a device's own memory, for what nobody asks the device for: the context and the code of the
// kernels (CUDA: about half a GiB), recorded graphs.
constexpr size_t kDeviceReserve = size_t{768} << 20;
// Of the pool that trial steps run over.
constexpr int kTrialBlocks = 64;
constexpr int kMaxBatchedTokens = 1 << 20;
constexpr int kMaxSequences = 1 << 16;
constexpr int kMaxThreads = 1024;
constexpr int kMaxRanks = 64;

absl::Status CheckRange(const char* flag, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidArgument("{} must be in [{}, {}], got {}", flag, low, high, value);
}

absl::Status CheckOptions(const EngineOptions& o) {
  if (o.load_format != "auto" && o.load_format != "dummy") {
    return InvalidArgument("--load-format must be auto or dummy, got \"{}\"", o.load_format);
  }
  if (o.dtype != "auto" && o.dtype != "float32" && o.dtype != "bfloat16") {
    return InvalidArgument("--dtype must be auto, float32 or bfloat16, got \"{}\"", o.dtype);
  }
  if (o.kv_cache_dtype != "auto" && o.kv_cache_dtype != "fp8") {
    return InvalidArgument("--kv-cache-dtype must be auto or fp8, got \"{}\"", o.kv_cache_dtype);
  }
  if (o.quantization != "auto" && o.quantization != "fp8") {
    return InvalidArgument("--quantization must be auto or fp8, got \"{}\"", o.quantization);
  }
  if (o.block_size != 16 && o.block_size != 32 && o.block_size != 64 && o.block_size != 128 &&
      o.block_size != 256) {
    return InvalidArgument("--block-size must be 16, 32, 64, 128 or 256, got {}", o.block_size);
  }
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--max-model-len", o.max_model_len, 0, std::numeric_limits<int>::max()));
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--max-num-batched-tokens", o.max_num_batched_tokens, 0, kMaxBatchedTokens));
  if (!(o.min_step_ms >= 0 && o.min_step_ms <= 60'000)) {
    return InvalidArgument("--min-step-ms must be in [0, 60000], got {}", o.min_step_ms);
  }
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--tensor-parallel-size", o.tensor_parallel_size, 1, kMaxRanks));
  TANDEM_RETURN_IF_ERROR(CheckRange("--max-num-seqs", o.max_num_seqs, 0, kMaxSequences));
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--kv-cache-memory-bytes", o.kv_cache_memory_bytes, 0, int64_t{1} << 50));
  if (!(o.gpu_memory_utilization > 0 && o.gpu_memory_utilization <= 1)) {
    return InvalidArgument("--gpu-memory-utilization must be in (0, 1], got {}",
                           o.gpu_memory_utilization);
  }
  return CheckRange("--num-threads", o.num_threads, 0, kMaxThreads);
}

// Settles the size of a step. Of two where one was given, the other one follows it.
absl::Status ResolveBatch(const BatchDefaults& defaults, EngineOptions* o) {
  const int tokens = o->max_num_batched_tokens, sequences = o->max_num_seqs;
  if (tokens == 0) o->max_num_batched_tokens = std::max(defaults.max_num_batched_tokens, sequences);
  if (sequences == 0) {
    o->max_num_seqs = std::min(defaults.max_num_seqs, o->max_num_batched_tokens);
  }
  if (o->max_num_batched_tokens >= o->max_num_seqs) return absl::OkStatus();
  return InvalidArgument(
      "--max-num-batched-tokens={} is less than --max-num-seqs={}: a step could not hold one "
      "token of every sequence",
      o->max_num_batched_tokens, o->max_num_seqs);
}

// Settles the dtype.
void ResolveDtype(const Device& device, EngineOptions* options) {
  const bool has_bf16 = device.has_bfloat16();
  if (options->dtype == "bfloat16" && !has_bf16) {
    spdlog::warn("this CPU has no bfloat16 arithmetic (AVX512-BF16 or AMX): using float32");
  }
  if (options->dtype == "auto" && !has_bf16) {
    spdlog::info("dtype float32: this CPU has no bfloat16 arithmetic (AVX512-BF16 or AMX)");
  }
  options->dtype = options->dtype == "float32" || !has_bf16 ? "float32" : "bfloat16";
}

// Settles the valid vocabulary.
absl::Status ResolveVocabulary(const ModelConfig& config, EngineOptions* options) {
  if (options->valid_vocab_size == 0) {
    TANDEM_ASSIGN_OR_RETURN(options->valid_vocab_size, TokenizerVocabSize(options->model_dir));
    if (options->valid_vocab_size > config.vocab_size) {
      return InvalidArgument(
          "{}: tokenizer.json uses {} token ids, more than the vocab_size {} of config.json",
          options->model_dir, options->valid_vocab_size, config.vocab_size);
    }
    if (options->valid_vocab_size == 0) options->valid_vocab_size = config.vocab_size;
  }
  return CheckRange("valid_vocab_size", options->valid_vocab_size, 1, config.vocab_size);
}

// For a pool in the host's memory, of which `available` was there before this process took any of
// it; settles its size where nobody gave it. `layout` is a rank's, sizes are those of all.
absl::StatusOr<PoolPlan> PlanHostPool(const ModelConfig& config, const KvLayout& layout,
                                      size_t available, EngineOptions* options) {
  const int limit = config.MaxModelLen();
  const int wanted_len = options->max_model_len > 0 ? options->max_model_len : limit;
  const auto ranks = static_cast<size_t>(options->tensor_parallel_size);
  const size_t sequence_bytes =
      static_cast<size_t>(layout.BlocksFor(wanted_len)) * layout.BlockBytes() * ranks;
  if (options->kv_cache_memory_bytes == 0) {
    const size_t enough = static_cast<size_t>(options->max_num_seqs) * sequence_bytes;
    const size_t share = static_cast<size_t>(static_cast<double>(available) * kDefaultMemoryShare);
    options->kv_cache_memory_bytes = static_cast<int64_t>(std::min(enough, share));
  }
  const size_t bytes = static_cast<size_t>(options->kv_cache_memory_bytes);
  if (bytes > available) {
    return ResourceExhausted("a KV pool of {} (--kv-cache-memory-bytes) does not fit: {} available",
                             FormatBytes(bytes), FormatBytes(available));
  }
  return PlanPool(layout, bytes / ranks, options->max_model_len, limit,
                  fmt::format("give --kv-cache-memory-bytes={}", sequence_bytes));
}

size_t WeightBytes(const ModelConfig& config, const EngineOptions& options) {
  const size_t element = options.dtype == "float32" ? 4 : 2;
  return static_cast<size_t>(config.NumParameters()) * element;
}

// Of a GPU, which keeps weights of 4 bits where they are whole.
size_t DeviceWeightBytes(const ModelConfig& config, const EngineOptions& options) {
  if (options.load_format == "dummy" || options.tensor_parallel_size > 1) {
    return WeightBytes(config, options);
  }
  return static_cast<size_t>(config.KeptWeightBytes(DType::kBFloat16));
}

// `before`: bytes of the host that were there before this process took any.
absl::Status CheckWeightMemory(const ModelConfig& config, size_t before,
                               const EngineOptions& options) {
  // Of all ranks, about: what is not split is there several times.
  const size_t needed =
      WeightBytes(config, options) * static_cast<size_t>(options.tensor_parallel_size);
  // What is shared and there already is not needed again.
  const size_t available = before + SharedWeightsSize(options.shared_weights);
  if (needed <= available) return absl::OkStatus();
  return ResourceExhausted("{}: weights in {} take {}, of which {} is available{}",
                           options.model_dir, options.dtype, FormatBytes(needed),
                           FormatBytes(available),
                           options.dtype == "float32" ? "; --dtype=bfloat16 takes half" : "");
}

// Memory that ran out at start: what would need less of it.
absl::Status WithRemedy(const absl::Status& status, const char* what,
                        const EngineOptions& options) {
  if (!absl::IsResourceExhausted(status)) return status;
  return ResourceExhausted(
      "{}: {}; lower --max-num-batched-tokens (now {}) or --max-num-seqs (now {}), or free memory "
      "that other processes hold",
      what, MessageOf(status), options.max_num_batched_tokens, options.max_num_seqs);
}

// Made by the steps of Load, in their order there; each uses what those before it settled.
class LoadedEngine final : public Engine {
 public:
  LoadedEngine(EngineOptions options, Rank rank)
      : options_(std::move(options)),
        shard_(rank.shard),
        ranks_on_device_(static_cast<size_t>(rank.on_device)),
        collective_(rank.collective),
        backend_(std::move(rank.backend)),
        used_before_(rank.used_before) {}

  absl::Status SettleDevice() {
    if (options_.num_threads == 0) options_.num_threads = PhysicalCores();
    options_.num_threads = std::max(1, options_.num_threads / shard_.size);
    options_.device = backend_->name();
    ResolveDtype(backend_->device(), &options_);
    return ResolveBatch(backend_->batch_defaults(), &options_);
  }

  absl::Status ReadConfig() {
    TANDEM_ASSIGN_OR_RETURN(config_, ModelConfig::Load(options_.model_dir));
    TANDEM_RETURN_IF_ERROR(SettleQuantisation());
    if (options_.pad_query_heads) TANDEM_RETURN_IF_ERROR(PadQueryHeads());
    if (!shard_.whole()) {
      TANDEM_ASSIGN_OR_RETURN(config_, ShardOf(config_, shard_));
    }
    return ResolveVocabulary(config_, &options_);
  }

  bool fp8_weights() const { return options_.quantization == "fp8"; }
  absl::Status SettleQuantisation() {
    if (fp8_weights()) {
      return CheckNotQuantised("--quantization=fp8", config_, options_.model_dir);
    }
    const std::optional<CheckpointQuantisation>& found = config_.quantisation;
    options_.quantization = found.has_value() ? found->MethodName() : "none";
    return absl::OkStatus();
  }

  absl::Status PadQueryHeads() {
    TANDEM_RETURN_IF_ERROR(CheckNotQuantised("--pad-query-heads", config_, options_.model_dir));
    padding_ = HeadPadding::Of(config_);
    config_.num_heads = padding_.groups * padding_.padded;
    spdlog::info("query heads of each of {} KV heads: {}, padded to {}", padding_.groups,
                 padding_.heads, padding_.padded);
    return absl::OkStatus();
  }

  // Whether the pool lies beside the weights in memory of the device. It then takes what they
  // leave, so that it comes after them.
  bool device_memory() const { return !backend_->device().shares_host_memory(); }

  // Settles the dtype's consequences; with memory of the host also the pool's size.
  absl::Status MakeOps() {
    const bool float32 = options_.dtype == "float32";
    const DType kv_dtype =
        KvCacheDType(options_.kv_cache_dtype, float32 ? DType::kFloat32 : DType::kBFloat16);
    options_.kv_cache_dtype = DTypeName(kv_dtype);
    region_.layout = config_.LayoutFor(options_.block_size, kv_dtype);
    region_.first_kv_head = shard_.rank * config_.num_kv_heads;
    const Device& device = backend_->device();
    if (!device_memory()) {
      // As it was when all ranks were opened: some may have loaded their parts by now, and all that
      // ranks take is compared with all that there was.
      const size_t total = device.TotalMemory();
      const size_t available = total - std::min(total, used_before_);
      TANDEM_RETURN_IF_ERROR(CheckWeightMemory(config_, available, options_));
      TANDEM_ASSIGN_OR_RETURN(const PoolPlan plan,
                              PlanHostPool(config_, region_.layout, available, &options_));
      TANDEM_RETURN_IF_ERROR(AllocatePool(plan));
    }
    OpsShape shape =
        OpsShapeOf(config_, float32 ? Element::kFloat32 : Element::kBFloat16, Limits());
    shape.batch_invariant = options_.batch_invariant;
    shape.fp8_kv = kv_dtype == DType::kFloat8E4M3;
    shape.ranks = shard_.size;
    shape.int4 = shape.int4 && shard_.whole();
    shape.fp8 = fp8_weights();
    absl::StatusOr<std::unique_ptr<Ops>> ops = backend_->MakeOps(shape);
    if (!ops.ok()) return WithRemedy(ops.status(), "scratch memory", options_);
    ops_ = *std::move(ops);
    if (!device_memory()) return absl::OkStatus();
    // What is certain not to fit is refused before the weights are read.
    DeviceMemory memory = MemoryOf(DeviceWeightBytes(config_, options_));
    memory.workspace = device.AllocatedMemory() + kDeviceReserve +
                       Decoder::WorkspaceBytes(config_, ops_->activation(), Limits());
    return PlanDevicePool(region_.layout, memory, options_.max_model_len, config_.MaxModelLen())
        .status();
  }

  absl::Status LoadModel() {
    const Element element = options_.dtype == "float32" ? Element::kFloat32 : Element::kBFloat16;
    Device* device = &backend_->device();
    absl::StatusOr<ModelWeights> weights =
        LoadModelWeights(config_,
                         {options_.model_dir, options_.load_format == "dummy", options_.seed,
                          element, options_.num_threads, options_.shared_weights,
                          options_.report_loading, padding_, shard_, fp8_weights()},
                         device, ops_.get());
    if (!weights.ok()) return WithRemedy(weights.status(), "weights", options_);
    absl::StatusOr<std::unique_ptr<Decoder>> decoder =
        Decoder::Create(config_, *std::move(weights), Limits(), device, ops_.get(), collective_);
    if (!decoder.ok()) return WithRemedy(decoder.status(), "workspace", options_);
    decoder_ = *std::move(decoder);
    return absl::OkStatus();
  }

  // Sizes a pool in memory of the device by what the largest steps leave of it.
  absl::Status SizeDevicePool() {
    if (!device_memory()) return absl::OkStatus();
    TANDEM_ASSIGN_OR_RETURN(const size_t taken, TakenByLargestSteps());
    DeviceMemory memory = MemoryOf(decoder_->weights().PackedBytes());
    memory.workspace = taken - std::min(taken, memory.weights) + kDeviceReserve;
    TANDEM_ASSIGN_OR_RETURN(
        PoolPlan plan,
        PlanDevicePool(region_.layout, memory, options_.max_model_len, config_.MaxModelLen()));
    if (collective_ != nullptr) {
      plan.num_blocks = collective_->Least(plan.num_blocks);
      plan.max_model_len = collective_->Least(plan.max_model_len);
    }
    const size_t pool = static_cast<size_t>(plan.num_blocks) * region_.layout.BlockBytes();
    options_.kv_cache_memory_bytes = static_cast<int64_t>(pool * ranks());
    spdlog::info("memory of {}: {} in use before, weights {}, workspaces {}, KV pool {}",
                 FormatBytes(memory.total), FormatBytes(memory.used_before),
                 FormatBytes(memory.weights), FormatBytes(memory.workspace), FormatBytes(pool));
    return AllocatePool(plan);
  }

  absl::Status MakeRunner() {
    absl::StatusOr<std::unique_ptr<DecoderRunner>> runner =
        DecoderRunner::Create(RunnerOptions(options_.max_model_len), region_, &backend_->device(),
                              decoder_.get(), ops_.get());
    if (!runner.ok()) return WithRemedy(runner.status(), "workspace of steps", options_);
    runner_ = *std::move(runner);
    const bool recordable = collective_ == nullptr || collective_->recordable();
    if (recordable && !options_.enforce_eager) runner_->RecordDecodeSteps();
    if (options_.min_step_ms > 0) {
      paced_ =
          std::make_unique<PacedRunner>(runner_.get(), absl::Milliseconds(options_.min_step_ms));
    }
    return absl::OkStatus();
  }

  const EngineOptions& options() const override { return options_; }
  const ModelConfig& config() const override { return config_; }
  const std::string& model_digest() const override { return decoder_->weights().digest; }
  KvRegion region() const override { return region_; }
  BlockPool& pool() override { return *pool_; }
  PrefixCache& cache() override { return *cache_; }
  ModelRunner& runner() override {
    if (paced_ != nullptr) return *paced_;
    return *runner_;
  }

  std::string Banner() const override {
    const int64_t tokens = int64_t{region_.num_blocks} * region_.layout.block_size;
    return fmt::format(
        "model {} ({}, {:.1f} M parameters, digest {}), dtype {}, quantization {}, device {}, "
        "weights {}; KV pool {}: {} blocks of {} tokens, {} bytes per token ({}); max_model_len "
        "{}, {:.1f} sequences of that length at once",
        options_.model_dir, options_.load_format == "dummy" ? "dummy weights" : "safetensors",
        static_cast<double>(config_.NumParameters()) / 1e6, model_digest(), options_.dtype,
        options_.quantization, backend_->device().Describe(),
        FormatBytes(decoder_->weights().PackedBytes()), FormatBytes(region_.TotalBytes()),
        region_.num_blocks, region_.layout.block_size, region_.layout.BytesPerToken(),
        options_.kv_cache_dtype, options_.max_model_len,
        static_cast<double>(tokens) / options_.max_model_len);
  }

 private:
  size_t ranks() const { return static_cast<size_t>(shard_.size); }

  DecoderRunner::Options RunnerOptions(int max_model_len) const {
    DecoderRunner::Options options{options_.max_num_batched_tokens, options_.max_num_seqs,
                                   max_model_len, options_.valid_vocab_size,
                                   backend_->max_in_flight()};
    // Reading the head once more costs a GPU as much as a tenth of a large decode step.
    if (device_memory()) options.max_logit_rows = std::clamp(options_.max_num_seqs, 64, 256);
    return options;
  }
  DecoderLimits Limits() const {
    return DecoderRunner::LimitsOf(RunnerOptions(options_.max_model_len));
  }

  DeviceMemory MemoryOf(size_t weights) const {
    // Ranks on one device have equal shares of it.
    DeviceMemory memory;
    memory.total = backend_->device().TotalMemory() / ranks_on_device_;
    memory.used_before = used_before_ / ranks_on_device_;
    memory.ranks = shard_.size;
    memory.weights = weights;
    memory.utilization = options_.gpu_memory_utilization;
    memory.pool = static_cast<size_t>(options_.kv_cache_memory_bytes) / ranks();
    return memory;
  }

  // Settles max_model_len.
  absl::Status AllocatePool(const PoolPlan& plan) {
    if (options_.max_model_len == 0 && plan.max_model_len < config_.MaxModelLen()) {
      spdlog::warn(
          "sequences are cut to {} tokens, of the {} that the model allows: the KV pool of {} "
          "holds no more; --kv-cache-memory-bytes={} would",
          plan.max_model_len, config_.MaxModelLen(), FormatBytes(options_.kv_cache_memory_bytes),
          static_cast<size_t>(region_.layout.BlocksFor(config_.MaxModelLen())) *
              region_.layout.BlockBytes() * static_cast<size_t>(shard_.size));
    }
    options_.max_model_len = plan.max_model_len;
    region_.num_blocks = plan.num_blocks;
    TANDEM_ASSIGN_OR_RETURN(kv_memory_, backend_->device().AllocateKvPool(region_.TotalBytes()));
    region_.base = kv_memory_.as<std::byte>();
    region_.fd = kv_memory_.fd();
    region_.memory = device_memory() ? KvMemoryKind::kDevice : KvMemoryKind::kHost;
    pool_ = std::make_unique<BlockPool>(region_.num_blocks);
    cache_ = std::make_unique<PrefixCache>(pool_.get(), options_.block_size,
                                           options_.enable_prefix_caching);
    return absl::OkStatus();
  }

  // Bytes of the device that this process holds while the largest prefill and the largest decode
  // step run, the pool of theirs excluded. Also loads their kernels.
  absl::StatusOr<size_t> TakenByLargestSteps() {
    Device& device = backend_->device();
    const int rows = options_.max_num_batched_tokens, items = options_.max_num_seqs;
    const int longest = std::min(rows, config_.MaxModelLen());
    const int full = std::min(rows / longest, items);  // sequences of the prefill step
    KvRegion region = region_;
    region.num_blocks = kTrialBlocks;
    absl::StatusOr<Buffer> memory = device.AllocateKvPool(region.TotalBytes());
    if (!memory.ok()) return WithRemedy(memory.status(), "a trial step", options_);
    region.base = memory->as<std::byte>();
    absl::StatusOr<std::unique_ptr<DecoderRunner>> runner = DecoderRunner::Create(
        RunnerOptions(config_.MaxModelLen()), region, &device, decoder_.get(), ops_.get());
    if (!runner.ok()) return WithRemedy(runner.status(), "workspace of steps", options_);
    // What comes out means nothing, so that sequences may write over each other's blocks.
    std::vector<int32_t> blocks(static_cast<size_t>(region.layout.BlocksFor(longest)));
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i) % kTrialBlocks;
    const std::vector<int32_t> tokens(static_cast<size_t>(longest), 0);
    const SamplingParams sampling;
    decoder_->MeetRanks();
    for (const bool prefill : {true, false}) {
      Batch batch;
      for (int i = 0; i < (prefill ? full : items); ++i) {
        BatchItem item;
        item.num_tokens = item.prompt_length = prefill ? longest : 1;
        item.tokens = std::span(tokens).first(static_cast<size_t>(item.num_tokens));
        item.block_table = blocks;
        item.sampling = &sampling;
        batch.items.push_back(item);
      }
      TANDEM_RETURN_IF_ERROR((*runner)->Run(batch).status());
    }
    return device.AllocatedMemory() - memory->size();
  }

  // Constant once loaded; destroyed last to first.
  EngineOptions options_;
  const Shard shard_;
  const size_t ranks_on_device_;
  Collective* const collective_;  // null: the only rank
  ModelConfig config_;            // with the heads of the padding, of the shard
  HeadPadding padding_;
  const std::shared_ptr<Backend> backend_;
  const size_t used_before_;  // bytes of the device, when this process had opened it
  Buffer kv_memory_;
  KvRegion region_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<PrefixCache> cache_;
  std::unique_ptr<DecoderRunner> runner_;
  std::unique_ptr<PacedRunner> paced_;  // null: steps take as long as they take
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Load(const EngineOptions& options) {
  TANDEM_RETURN_IF_ERROR(CheckOptions(options));
  if (options.tensor_parallel_size > 1) return LoadTensorParallel(options);
  TANDEM_ASSIGN_OR_RETURN(std::vector<Rank> only, OpenRanks(options));
  return LoadRank(options, std::move(only.front()));
}

absl::StatusOr<std::unique_ptr<Engine>> LoadRank(const EngineOptions& options, Rank rank) {
  auto engine = std::make_unique<LoadedEngine>(options, std::move(rank));
  TANDEM_RETURN_IF_ERROR(engine->SettleDevice());
  TANDEM_RETURN_IF_ERROR(engine->ReadConfig());
  TANDEM_RETURN_IF_ERROR(engine->MakeOps());
  TANDEM_RETURN_IF_ERROR(engine->LoadModel());
  TANDEM_RETURN_IF_ERROR(engine->SizeDevicePool());
  TANDEM_RETURN_IF_ERROR(engine->MakeRunner());
  return engine;
}

}  // namespace tandem::engine
