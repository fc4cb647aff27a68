#include "engine/runtime/engine.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "engine/device/cpu/threads.h"
#include "engine/model/decoder.h"
#include "engine/model/tokenizer_size.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/decoder_runner.h"

namespace tandem::engine {
namespace {

// Of the memory available, for a KV pool whose size nobody gave: several workers may start at once.
constexpr double kDefaultMemoryShare = 0.2;
constexpr int kMaxBatchedTokens = 1 << 20;
constexpr int kMaxSequences = 1 << 16;
constexpr int kMaxThreads = 1024;

std::string Size(size_t bytes) {
  constexpr double kKiB = 1024;
  const double b = static_cast<double>(bytes);
  if (b >= kKiB * kKiB * kKiB) return fmt::format("{:.2f} GiB", b / (kKiB * kKiB * kKiB));
  if (b >= kKiB * kKiB) return fmt::format("{:.1f} MiB", b / (kKiB * kKiB));
  return fmt::format("{:.1f} KiB", b / kKiB);
}

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
  if (o.block_size != 16 && o.block_size != 32 && o.block_size != 64 && o.block_size != 128 &&
      o.block_size != 256) {
    return InvalidArgument("--block-size must be 16, 32, 64, 128 or 256, got {}", o.block_size);
  }
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--max-model-len", o.max_model_len, 0, std::numeric_limits<int>::max()));
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--max-num-batched-tokens", o.max_num_batched_tokens, 1, kMaxBatchedTokens));
  TANDEM_RETURN_IF_ERROR(CheckRange("--max-num-seqs", o.max_num_seqs, 1, kMaxSequences));
  TANDEM_RETURN_IF_ERROR(
      CheckRange("--kv-cache-memory-bytes", o.kv_cache_memory_bytes, 0, int64_t{1} << 50));
  TANDEM_RETURN_IF_ERROR(CheckRange("--num-threads", o.num_threads, 0, kMaxThreads));
  if (o.max_num_batched_tokens < o.max_num_seqs) {
    return InvalidArgument(
        "--max-num-batched-tokens={} is less than --max-num-seqs={}: a step could not hold one "
        "token of every sequence",
        o.max_num_batched_tokens, o.max_num_seqs);
  }
  return absl::OkStatus();
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

// Settles max_model_len and the number of blocks.
absl::StatusOr<int> ResolvePool(const ModelConfig& config, const KvLayout& layout,
                                const Device& device, EngineOptions* options) {
  const int limit = config.MaxModelLen();
  if (options->max_model_len > limit) {
    return InvalidArgument(
        "--max-model-len={} exceeds what the model's positions allow; the "
        "largest is {}",
        options->max_model_len, limit);
  }
  const size_t block_bytes = layout.BlockBytes();
  const size_t block_size = static_cast<size_t>(layout.block_size);
  const int wanted_len = options->max_model_len > 0 ? options->max_model_len : limit;
  const size_t blocks_per_sequence = static_cast<size_t>(layout.BlocksFor(wanted_len));
  if (options->kv_cache_memory_bytes == 0) {
    const size_t enough =
        static_cast<size_t>(options->max_num_seqs) * blocks_per_sequence * block_bytes;
    const size_t share =
        static_cast<size_t>(static_cast<double>(device.AvailableKvMemory()) * kDefaultMemoryShare);
    options->kv_cache_memory_bytes = static_cast<int64_t>(std::min(enough, share));
  }
  const size_t blocks =
      std::min<size_t>(static_cast<size_t>(options->kv_cache_memory_bytes) / block_bytes,
                       std::numeric_limits<int32_t>::max());
  if (blocks == 0) {
    return InvalidArgument(
        "--kv-cache-memory-bytes={} does not hold a single block of {} tokens, which takes {} "
        "bytes",
        options->kv_cache_memory_bytes, layout.block_size, block_bytes);
  }
  const size_t fits = std::min(blocks * block_size, static_cast<size_t>(limit));
  if (static_cast<size_t>(options->max_model_len) > fits) {
    return InvalidArgument(
        "--max-model-len={} does not fit the KV pool of {} ({} blocks of {} tokens); the largest "
        "that would fit is {}, or give --kv-cache-memory-bytes={}",
        options->max_model_len, Size(blocks * block_bytes), blocks, block_size, fits,
        blocks_per_sequence * block_bytes);
  }
  if (options->max_model_len == 0) options->max_model_len = static_cast<int>(fits);
  return static_cast<int>(blocks);
}

absl::Status CheckWeightMemory(const ModelConfig& config, const Device& device,
                               const EngineOptions& options) {
  const size_t element = options.dtype == "float32" ? 4 : 2;
  const size_t needed = static_cast<size_t>(config.NumParameters()) * element;
  const size_t available = device.AvailableMemory();
  if (needed <= available) return absl::OkStatus();
  return ResourceExhausted("{}: weights in {} take {}, of which {} is available{}",
                           options.model_dir, options.dtype, Size(needed), Size(available),
                           options.dtype == "float32" ? "; --dtype=bfloat16 takes half" : "");
}

// Made by the steps of Load, in this order; each uses what those before it settled.
class LoadedEngine final : public Engine {
 public:
  explicit LoadedEngine(EngineOptions options) : options_(std::move(options)) {}

  absl::Status OpenDevice() {
    TANDEM_ASSIGN_OR_RETURN(backend_,
                            OpenBackend(options_.device, {.num_threads = options_.num_threads}));
    options_.device = backend_->name();
    if (options_.num_threads == 0) options_.num_threads = PhysicalCores();
    ResolveDtype(backend_->device(), &options_);
    return absl::OkStatus();
  }

  absl::Status ReadConfig() {
    TANDEM_ASSIGN_OR_RETURN(config_, ModelConfig::Load(options_.model_dir));
    return ResolveVocabulary(config_, &options_);
  }

  absl::Status AllocatePool() {
    Device& device = backend_->device();
    const DType dtype = options_.dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
    region_.layout = config_.LayoutFor(options_.block_size, dtype);
    TANDEM_RETURN_IF_ERROR(CheckWeightMemory(config_, device, options_));
    TANDEM_ASSIGN_OR_RETURN(region_.num_blocks,
                            ResolvePool(config_, region_.layout, device, &options_));
    TANDEM_ASSIGN_OR_RETURN(kv_memory_, device.AllocateKvPool(region_.TotalBytes()));
    region_.base = kv_memory_.as<std::byte>();
    region_.fd = kv_memory_.fd();
    pool_ = std::make_unique<BlockPool>(region_.num_blocks);
    cache_ = std::make_unique<PrefixCache>(pool_.get(), options_.block_size,
                                           options_.enable_prefix_caching);
    return absl::OkStatus();
  }

  absl::Status LoadModel() {
    const Element element = options_.dtype == "float32" ? Element::kFloat32 : Element::kBFloat16;
    const DecoderLimits limits = DecoderRunner::LimitsOf(RunnerOptions());
    TANDEM_ASSIGN_OR_RETURN(ops_, backend_->MakeOps(OpsShapeOf(config_, element, limits)));
    TANDEM_ASSIGN_OR_RETURN(ModelWeights weights,
                            LoadModelWeights(config_,
                                             {options_.model_dir, options_.load_format == "dummy",
                                              options_.seed, element, options_.num_threads},
                                             &backend_->device(), ops_.get()));
    TANDEM_ASSIGN_OR_RETURN(decoder_, Decoder::Create(config_, std::move(weights), limits,
                                                      &backend_->device(), ops_.get()));
    return absl::OkStatus();
  }

  absl::Status MakeRunner() {
    TANDEM_ASSIGN_OR_RETURN(runner_,
                            DecoderRunner::Create(RunnerOptions(), region_, &backend_->device(),
                                                  decoder_.get(), ops_.get()));
    return absl::OkStatus();
  }

  const EngineOptions& options() const override { return options_; }
  const ModelConfig& config() const override { return config_; }
  const std::string& model_digest() const override { return decoder_->weights().digest; }
  KvRegion region() const override { return region_; }
  BlockPool& pool() override { return *pool_; }
  PrefixCache& cache() override { return *cache_; }
  ModelRunner& runner() override { return *runner_; }

  std::string Banner() const override {
    const int64_t tokens = int64_t{region_.num_blocks} * region_.layout.block_size;
    return fmt::format(
        "model {} ({}, {:.1f} M parameters, digest {}), dtype {}, device {}, weights {}; KV pool "
        "{}: {} blocks of {} tokens, {} bytes per token; max_model_len {}, {:.1f} sequences of "
        "that length at once",
        options_.model_dir, options_.load_format == "dummy" ? "dummy weights" : "safetensors",
        static_cast<double>(config_.NumParameters()) / 1e6, model_digest().substr(0, 8),
        options_.dtype, backend_->device().Describe(), Size(decoder_->weights().PackedBytes()),
        Size(region_.TotalBytes()), region_.num_blocks, region_.layout.block_size,
        region_.layout.BytesPerToken(), options_.max_model_len,
        static_cast<double>(tokens) / options_.max_model_len);
  }

 private:
  DecoderRunner::Options RunnerOptions() const {
    return {options_.max_num_batched_tokens, options_.max_num_seqs, options_.max_model_len,
            options_.valid_vocab_size, backend_->max_in_flight()};
  }

  // Constant once loaded; destroyed last to first.
  EngineOptions options_;
  ModelConfig config_;
  std::unique_ptr<Backend> backend_;
  Buffer kv_memory_;
  KvRegion region_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<PrefixCache> cache_;
  std::unique_ptr<DecoderRunner> runner_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Load(const EngineOptions& options) {
  TANDEM_RETURN_IF_ERROR(CheckOptions(options));
  auto engine = std::make_unique<LoadedEngine>(options);
  TANDEM_RETURN_IF_ERROR(engine->OpenDevice());
  TANDEM_RETURN_IF_ERROR(engine->ReadConfig());
  TANDEM_RETURN_IF_ERROR(engine->AllocatePool());
  TANDEM_RETURN_IF_ERROR(engine->LoadModel());
  TANDEM_RETURN_IF_ERROR(engine->MakeRunner());
  return engine;
}

}  // namespace tandem::engine
