// `tandem inspect MODEL_DIR`: what a model is and what memory it needs.
#include <algorithm>
#include <optional>

#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "cli/command.h"
#include "cli/model_check.h"
#include "cli/units.h"
#include "cli/wide_pages.h"
#include "common/base/checkpoint_quantisation.h"
#include "common/base/file.h"
#include "common/base/host_memory.h"
#include "common/base/model_config.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/base/weight_files.h"
#include "common/config/bytes.h"
#include "common/config/dtype_choices.h"

namespace tandem::cli {
namespace {

// Cards that people have, by their makers' figure, and what a worker on one leaves of it for
// weights and KV: --gpu-memory-utilization, and its context, kernels and workspaces.
constexpr int kCardGigabytes[] = {24, 48, 80};
constexpr int kHopperGigabytes = 80;  // and of an A100, which keeps nothing for wide pages
constexpr double kCardUtilisation = 0.9;
constexpr int64_t kCardReserve = int64_t{768} << 20;

struct Findings {
  ModelConfig config;
  CheckedModel checked;
  DType dtype = DType::kBFloat16;  // of weights
  KvLayout layout;
  int64_t parameters = 0;
  int64_t weight_bytes = 0;      // in memory, as `dtype`
  int64_t gpu_weight_bytes = 0;  // a GPU keeps those of 4 bits
  int64_t memory = 0;

  int64_t KvBytesIn(int64_t bytes) const { return std::max<int64_t>(0, bytes - weight_bytes); }
  // Tokens of whole blocks.
  int64_t TokensOf(int64_t kv_bytes) const {
    return kv_bytes / static_cast<int64_t>(layout.BlockBytes()) * layout.block_size;
  }
  int64_t TokensIn(int64_t bytes) const { return TokensOf(KvBytesIn(bytes)); }
  int64_t TokensOnCard(int gigabytes) const {
    const auto share = static_cast<int64_t>(kCardUtilisation * gigabytes * (1 << 30));
    const int64_t wide = gigabytes == kHopperGigabytes ? WidePageBytes(config, layout.dtype) : 0;
    return TokensOf(std::max<int64_t>(0, share - kCardReserve - wide - gpu_weight_bytes));
  }
};

nlohmann::ordered_json QuantisationJson(const std::optional<CheckpointQuantisation>& quantisation) {
  if (!quantisation.has_value()) return nullptr;
  return {{"method", std::string(quantisation->MethodName())},
          {"bits", CheckpointQuantisation::kBits},
          {"group_size", quantisation->group_size},
          {"symmetric", quantisation->symmetric},
          {"act_order", quantisation->act_order}};
}

void PrintJson(const Findings& f) {
  nlohmann::ordered_json cards = nlohmann::ordered_json::array();
  for (const int gigabytes : kCardGigabytes) {
    cards.push_back({{"gigabytes", gigabytes}, {"tokens_that_fit", f.TokensOnCard(gigabytes)}});
  }
  const nlohmann::ordered_json out = {
      {"architecture", f.config.architecture},
      {"parameters", f.parameters},
      {"num_layers", f.config.num_layers},
      {"hidden_size", f.config.hidden_size},
      {"intermediate_size", f.config.intermediate_size},
      {"num_heads", f.config.num_heads},
      {"num_kv_heads", f.config.num_kv_heads},
      {"head_dim", f.config.head_dim},
      {"vocab_size", f.config.vocab_size},
      {"tie_word_embeddings", f.config.tie_word_embeddings},
      {"max_model_len", f.config.MaxModelLen()},
      {"weight_files", f.checked.weight_files},
      {"tokenizer", f.checked.has_tokenizer},
      {"chat_template", f.checked.has_chat_template},
      {"checkpoint_dtype", std::string(DTypeName(f.config.checkpoint_dtype))},
      {"checkpoint_bytes", f.checked.checkpoint_bytes},
      {"quantization", QuantisationJson(f.config.quantisation)},
      {"dtype", std::string(DTypeName(f.dtype))},
      {"kv_dtype", std::string(DTypeName(f.layout.dtype))},
      {"weight_bytes", f.weight_bytes},
      {"gpu_weight_bytes", f.gpu_weight_bytes},
      {"block_size", f.layout.block_size},
      {"kv_bytes_per_token", f.layout.BytesPerToken()},
      {"kv_bytes_per_block", f.layout.BlockBytes()},
      {"memory_bytes", f.memory},
      {"kv_bytes", f.KvBytesIn(f.memory)},
      {"tokens_that_fit", f.TokensIn(f.memory)},
      {"cards", cards}};
  fmt::print("{}\n", out.dump());
}

void PrintText(const Findings& f) {
  const ModelConfig& c = f.config;
  const std::string dtype(DTypeName(f.dtype));
  fmt::print("architecture      {}\n", c.architecture);
  fmt::print("parameters        {}\n", CountText(f.parameters));
  fmt::print("shape             {} layers, hidden {}, intermediate {}, vocabulary {}{}\n",
             c.num_layers, c.hidden_size, c.intermediate_size, CountText(c.vocab_size),
             c.tie_word_embeddings ? ", tied embeddings" : "");
  fmt::print("attention         {} query heads, {} KV heads of {}\n", c.num_heads, c.num_kv_heads,
             c.head_dim);
  const bool scaled = !std::holds_alternative<std::monostate>(c.rope_scaling);
  fmt::print("longest sequence  {} tokens{}\n", CountText(c.MaxModelLen()),
             scaled ? fmt::format(" ({})", DescribeRopeScaling(c.rope_scaling)) : "");
  fmt::print(
      "checkpoint        {}, {}\n", DTypeName(c.checkpoint_dtype),
      f.checked.weight_files > 0
          ? fmt::format("{} B ({}), {} file{}, all whole", CountText(f.checked.checkpoint_bytes),
                        FormatBytes(f.checked.checkpoint_bytes), f.checked.weight_files,
                        f.checked.weight_files == 1 ? "" : "s")
          : "no safetensors files (--load-format dummy only)");
  fmt::print("text              tokenizer {}, chat template {}\n",
             f.checked.has_tokenizer ? "yes" : "none",
             f.checked.has_chat_template ? "yes" : "none");
  if (c.quantisation.has_value()) {
    fmt::print("quantisation      {}; embedding and head are not\n", c.quantisation->Describe());
  }
  fmt::print("weights           {} B ({}) as {}{}\n", CountText(f.weight_bytes),
             FormatBytes(f.weight_bytes), dtype,
             c.quantisation.has_value() ? ", dequantised when loaded" : "");
  if (c.quantisation.has_value()) {
    fmt::print("on a GPU          {} B ({}): of 4 bits, the others {}\n",
               CountText(f.gpu_weight_bytes), FormatBytes(f.gpu_weight_bytes), dtype);
  }
  fmt::print("KV per token      {} B as {}\n", CountText(f.layout.BytesPerToken()),
             DTypeName(f.layout.dtype));
  fmt::print("KV per block      {} B ({} tokens)\n", CountText(f.layout.BlockBytes()),
             f.layout.block_size);
  if (f.KvBytesIn(f.memory) == 0) {
    fmt::print("fits              nothing: the weights alone do not fit into {}\n",
               FormatBytes(f.memory));
  } else {
    const int64_t tokens = f.TokensIn(f.memory);
    fmt::print("fits              {} tokens of KV in {}: {} sequences of {}\n", CountText(tokens),
               FormatBytes(f.memory), CountText(tokens / std::max(1, c.MaxModelLen())),
               CountText(c.MaxModelLen()));
  }
  for (const int gigabytes : kCardGigabytes) {
    const int64_t tokens = f.TokensOnCard(gigabytes);
    fmt::print("on a {} GB GPU    {}\n", gigabytes,
               tokens > 0 ? CountText(tokens) + " tokens of KV beside the weights"
                          : "nothing: the weights alone do not fit");
  }
}

}  // namespace

int RunInspect(const Arguments& arguments) {
  FlagSet flags("tandem inspect", "Says what a model directory holds and what memory it needs.");
  std::string model_dir;
  int block_size = 16;
  std::string dtype = "auto";
  std::string kv_cache_dtype = "auto";
  int64_t memory = 0;
  bool json = false;
  flags.AddPositional("MODEL_DIR", &model_dir, "checkpoint with a config.json", true);
  flags.Add("--block-size", &block_size, "KV block size: 16, 32, 64, 128 or 256", "tokens");
  flags.AddChoice("--dtype", &dtype, kDTypeChoices,
                  "weights and KV; auto: bfloat16, or float32 of a checkpoint that is");
  flags.AddChoice("--kv-cache-dtype", &kv_cache_dtype, kKvCacheDTypeChoices,
                  "KV; auto: as the weights; fp8: a byte a number");
  flags.AddBytes("--memory", &memory,
                 "memory for weights and KV; 0: this machine's, or its control group's");
  flags.Add("--json", &json, "one JSON object instead of text");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;
  if (block_size < 16 || block_size > 256 || (block_size & (block_size - 1)) != 0) {
    fmt::print(stderr, "tandem inspect: --block-size: must be 16, 32, 64, 128 or 256, got {}\n",
               block_size);
    return kExitUsage;
  }
  absl::Status status = ResolveModelDir("MODEL_DIR", &model_dir);
  if (status.ok()) status = CheckModelDir("MODEL_DIR", model_dir);
  if (!status.ok()) return Fail("inspect", status);
  // A description without weights can be looked at too.
  const bool described_only = absl::IsNotFound(ListWeightFiles(model_dir).status());
  absl::StatusOr<CheckedModel> checked = CheckModel(model_dir, described_only);
  if (!checked.ok()) return Fail("inspect", checked.status());

  Findings findings{.config = checked->config, .checked = *checked};
  const bool wide = dtype == "float32" ||
                    (dtype == "auto" && findings.config.checkpoint_dtype == DType::kFloat32);
  const DType chosen = wide ? DType::kFloat32 : DType::kBFloat16;
  findings.dtype = chosen;
  findings.layout = findings.config.LayoutFor(block_size, KvCacheDType(kv_cache_dtype, chosen));
  findings.parameters = findings.config.NumParameters();
  findings.weight_bytes = findings.parameters * static_cast<int64_t>(DTypeSize(chosen));
  findings.gpu_weight_bytes = findings.config.KeptWeightBytes(chosen);
  findings.memory = memory > 0 ? memory : static_cast<int64_t>(ReadHostMemory().total);
  if (json) {
    PrintJson(findings);
  } else {
    PrintText(findings);
  }
  return kExitOk;
}

}  // namespace tandem::cli
