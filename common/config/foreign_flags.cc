#include "common/config/foreign_flags.h"

#include <algorithm>
#include <array>

namespace tandem {
namespace {

using Hint = std::pair<std::string_view, std::string_view>;

constexpr std::string_view kRanks =
    "use --tensor-parallel-size to split a model; more GPUs serve more with --prefill N and "
    "--decode N";
constexpr std::string_view kQuantization =
    "use --quantization fp8; a checkpoint says itself that it is 4-bit GPTQ or AWQ "
    "(docs/quantisation.md)";
constexpr std::string_view kOneModel = "a cluster serves one model without adapters";
constexpr std::string_view kDirectoryOnly =
    "nothing is downloaded; --model takes a directory, also one of the Hugging Face cache";
constexpr std::string_view kAlwaysChunked =
    "prompts are always cut into chunks; --max-num-batched-tokens says how large";
constexpr std::string_view kKeysFile =
    "use --api-keys-file, which holds digests of keys; `tandem key new` makes one "
    "(docs/security.md)";
constexpr std::string_view kDirect = "give --model DIR";
constexpr std::string_view kDeviceMemory = "use --gpu-memory-utilization";
constexpr std::string_view kLonger = "use --max-model-len";
constexpr std::string_view kStreams = "use --max-num-seqs";
constexpr std::string_view kQueue = "use --max-queued-requests and --max-streams";
constexpr std::string_view kRoles = "disaggregation is built in: --prefill N and --decode N";

// Sorted by name.
constexpr std::array kHints = std::to_array<Hint>({
    {"--api-key", kKeysFile},
    {"--batch-size", "use --max-num-batched-tokens"},
    {"--cpu-offload-gb", "weights stay on the device"},
    {"--ctx-size", kLonger},
    {"--cuda-graphs", "CUDA graphs are recorded where they help; not with --enforce-eager"},
    {"--cuda-memory-fraction", kDeviceMemory},
    {"--data-parallel-size", "more workers serve more: --prefill N and --decode N"},
    {"--disable-log-requests", "use --log-level warn"},
    {"--disable-log-stats", "use --log-level warn"},
    {"--distributed-executor-backend", kRanks},
    {"--download-dir", kDirectoryOnly},
    {"--enable-chunked-prefill", kAlwaysChunked},
    {"--enable-lora", kOneModel},
    {"--generation-config", "the model's generation_config.json gives the defaults"},
    {"--hf-token", kDirectoryOnly},
    {"--hostname", "use --host"},
    {"--huggingface-hub-cache", kDirectoryOnly},
    {"--kv-transfer-config", kRoles},
    {"--max-batch-prefill-tokens", "use --max-num-batched-tokens"},
    {"--max-batch-total-tokens", "use --kv-cache-memory-bytes"},
    {"--max-concurrent-requests", kQueue},
    {"--max-input-length", kLonger},
    {"--max-input-tokens", kLonger},
    {"--max-seq-len", kLonger},
    {"--max-total-tokens", kLonger},
    {"--max-waiting-tokens", "decode workers do not stop for prompts here"},
    {"--model-id", kDirect},
    {"--model-impl", "the model's family is read from config.json"},
    {"--n-gpu-layers", "use --device cuda or cpu; a model is on one of them as a whole"},
    {"--num-gpu-blocks-override", "use --kv-cache-memory-bytes"},
    {"--num-shard", kRanks},
    {"--otlp-service-name", "a span's service.name is its program: tandem_router, ..."},
    {"--otlp-traces-endpoint", "use --otlp-endpoint HOST:PORT, which is spoken to over gRPC"},
    {"--parallel", kStreams},
    {"--pipeline-parallel-size", kRanks},
    {"--quantize", kQuantization},
    {"--revision", "give the directory of that snapshot as --model"},
    {"--sharded", kRanks},
    {"--shutdown-timeout", "use --drain-timeout"},
    {"--swap-space", "a sequence whose blocks are needed is computed again, not swapped out"},
    {"--threads", "use --num-threads"},
    {"--tokenizer", "the tokenizer is the one in the model's directory"},
    {"--trust-remote-code", "no code of a checkpoint is ever run"},
    {"--trust-request-chat-template", "the template is the one in the model's directory"},
    {"--uvicorn-log-level", "use --log-level"},
});
static_assert(std::is_sorted(kHints.begin(), kHints.end()));

}  // namespace

std::optional<std::string_view> ForeignFlagHint(std::string_view name) {
  const auto found = std::lower_bound(
      kHints.begin(), kHints.end(), name,
      [](const Hint& hint, std::string_view wanted) { return hint.first < wanted; });
  if (found == kHints.end() || found->first != name) return std::nullopt;
  return found->second;
}

std::span<const Hint> ForeignFlagHints() { return kHints; }

}  // namespace tandem
