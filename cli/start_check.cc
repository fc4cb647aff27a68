#include "cli/start_check.h"

#include <algorithm>
#include <limits>

#include "absl/strings/numbers.h"

#include "common/base/cpu_features.h"
#include "common/base/not_quantised.h"
#include "common/base/status.h"
#include "common/config/bytes.h"
#include "common/config/dtype_choices.h"

namespace tandem::cli {
namespace {

// What a worker on the CPU takes where nobody says (engine/runtime/backend.h).
constexpr int kBatchedTokens = 512;
constexpr int kSequences = 64;

// The last value of `name` among flags of the forms --name=value and --name value.
std::optional<std::string> ValueOf(const std::vector<std::string>& flags, const std::string& name) {
  std::optional<std::string> value;
  for (size_t i = 0; i < flags.size(); ++i) {
    if (flags[i].starts_with(name + "=")) value = flags[i].substr(name.size() + 1);
    if (flags[i] == name && i + 1 < flags.size()) value = flags[i + 1];
  }
  return value;
}

absl::StatusOr<int64_t> Parsed(const std::string& name, const std::string& value,
                               const absl::StatusOr<int64_t>& number) {
  if (number.ok()) return number;
  return InvalidArgument("{}={}: {}", name, value, MessageOf(number.status()));
}

absl::StatusOr<int64_t> BytesOf(const std::vector<std::string>& flags, const std::string& name) {
  const std::optional<std::string> value = ValueOf(flags, name);
  if (!value) return 0;
  return Parsed(name, *value, ParseBytes(*value));
}

// Of tokens or sequences; 0: nobody says.
absl::StatusOr<int> CountOf(const std::vector<std::string>& flags, const std::string& name) {
  const std::optional<std::string> value = ValueOf(flags, name);
  if (!value) return 0;
  TANDEM_ASSIGN_OR_RETURN(const int64_t number, Parsed(name, *value, ParseCount(*value)));
  if (number < 0 || number > std::numeric_limits<int>::max()) {
    return InvalidArgument("{} must be from 0 to 2147483647, got {}", name, number);
  }
  return static_cast<int>(number);
}

absl::StatusOr<std::string> ChoiceOf(const std::vector<std::string>& flags, const std::string& name,
                                     const std::vector<std::string>& choices) {
  const std::string value = ValueOf(flags, name).value_or(choices.front());
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return value;
  return InvalidArgument("{}={}: must be one of {}", name, value, fmt::join(choices, ", "));
}

// As a worker on this CPU settles it.
DType DTypeOf(const std::string& name) {
  return name == "float32" || !CpuHasBF16() ? DType::kFloat32 : DType::kBFloat16;
}

absl::Status ReadFlags(const std::vector<std::string>& flags, StartInputs* in) {
  TANDEM_ASSIGN_OR_RETURN(const std::string format,
                          ChoiceOf(flags, "--load-format", {"auto", "dummy"}));
  in->dummy = format == "dummy";
  TANDEM_ASSIGN_OR_RETURN(const std::string dtype,
                          ChoiceOf(flags, "--dtype", {"auto", "float32", "bfloat16"}));
  in->dtype = DTypeOf(dtype);
  TANDEM_ASSIGN_OR_RETURN(const std::string kv_dtype,
                          ChoiceOf(flags, "--kv-cache-dtype", kKvCacheDTypeChoices));
  in->kv_dtype = KvCacheDType(kv_dtype, in->dtype);
  TANDEM_ASSIGN_OR_RETURN(const std::string quantization,
                          ChoiceOf(flags, "--quantization", kQuantizationChoices));
  in->fp8_weights = quantization == "fp8";
  TANDEM_ASSIGN_OR_RETURN(const std::string block_size,
                          ChoiceOf(flags, "--block-size", {"16", "32", "64", "128", "256"}));
  (void)absl::SimpleAtoi(block_size, &in->block_size);
  TANDEM_ASSIGN_OR_RETURN(in->max_model_len, CountOf(flags, "--max-model-len"));
  TANDEM_ASSIGN_OR_RETURN(const int tokens, CountOf(flags, "--max-num-batched-tokens"));
  TANDEM_ASSIGN_OR_RETURN(const int sequences, CountOf(flags, "--max-num-seqs"));
  in->max_num_batched_tokens = tokens > 0 ? tokens : std::max(kBatchedTokens, sequences);
  in->max_num_seqs = sequences > 0 ? sequences : std::min(kSequences, in->max_num_batched_tokens);
  TANDEM_ASSIGN_OR_RETURN(in->kv_bytes, BytesOf(flags, "--kv-cache-memory-bytes"));
  TANDEM_ASSIGN_OR_RETURN(const int ranks, CountOf(flags, "--tensor-parallel-size"));
  in->ranks = std::max(1, ranks);
  return absl::OkStatus();
}

// As a worker has it, but before one is started.
absl::Status CheckDevice(const StartRequest& request, const StartInputs& inputs) {
  const std::optional<std::string> devices = ValueOf(request.flags, "--devices");
  if (request.on_cpu && devices.has_value()) {
    return InvalidArgument(
        "--devices={} names GPUs, and workers would compute on the CPU: there is no usable GPU, or "
        "--device=cpu; leave --devices out",
        *devices);
  }
  if (!request.on_cpu && inputs.fp8_weights) {
    return InvalidArgument(
        "--quantization=fp8 is for CPUs: GPUs do not read weights of 8 bits yet; leave it out, or "
        "give --device=cpu");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CheckedStart> CheckStart(const StartRequest& request, const HostMemory& memory) {
  CheckedStart start;
  TANDEM_RETURN_IF_ERROR(ReadFlags(request.flags, &start.inputs));
  TANDEM_RETURN_IF_ERROR(CheckDevice(request, start.inputs));
  TANDEM_ASSIGN_OR_RETURN(start.model, CheckModel(request.model_dir, start.inputs.dummy));
  if (start.inputs.fp8_weights) {
    TANDEM_RETURN_IF_ERROR(
        CheckNotQuantised("--quantization=fp8", start.model.config, request.model_dir));
  }
  start.warnings = start.model.warnings;
  start.inputs.model = start.model.config;
  start.inputs.workers = static_cast<int>(request.workers.size());
  start.inputs.share_weights = request.share_weights;
  start.inputs.memory = memory;
  if (!request.on_cpu) return start;
  if (start.inputs.fp8_weights) {
    start.warnings.push_back(
        fmt::format("--quantization=fp8 rounds the weights and saves nothing on a CPU, which keeps "
                    "them as {}",
                    DTypeName(start.inputs.dtype)));
  }
  absl::StatusOr<StartPlan> plan = PlanStart(start.inputs);
  if (!plan.ok()) {
    return absl::Status(plan.status().code(),
                        fmt::format("{}: {}", request.model_dir, MessageOf(plan.status())));
  }
  start.warnings.insert(start.warnings.end(), plan->warnings.begin(), plan->warnings.end());
  start.plan = *std::move(plan);
  return start;
}

std::string CheckedStartText(const StartRequest& request, const CheckedStart& start) {
  const CheckedModel& model = start.model;
  std::string out = fmt::format(
      "model {}: {}, {:.1f} M parameters, {}, tokenizer {}, chat template {}\n", request.model_dir,
      model.config.architecture, static_cast<double>(model.config.NumParameters()) / 1e6,
      model.weight_files == 0
          ? "dummy weights"
          : fmt::format("{} weight file{} ({})", model.weight_files,
                        model.weight_files == 1 ? "" : "s", FormatBytes(model.checkpoint_bytes)),
      model.has_tokenizer ? "yes" : "none", model.has_chat_template ? "yes" : "none");
  if (start.plan) {
    out += StartPlanText(start.inputs, *start.plan, request.workers, request.threads);
  } else {
    out += fmt::format("{} workers on GPUs, each of which plans the memory of its card\n",
                       request.workers.size());
  }
  for (const std::string& warning : start.warnings) out += "warning: " + warning + "\n";
  return out;
}

}  // namespace tandem::cli
