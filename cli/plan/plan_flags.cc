#include "cli/plan/plan_flags.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_join.h"
#include "fmt/format.h"

#include "cli/bench/arrivals.h"
#include "cli/bench/trace.h"
#include "cli/bench/workload.h"
#include "cli/wide_pages.h"
#include "common/base/file.h"
#include "common/base/nearest_name.h"
#include "common/base/status.h"
#include "common/config/bytes.h"
#include "common/config/dtype_choices.h"
#include "simulation/catalogue.h"

namespace tandem::cli {
namespace {

using simulation::Card;
using simulation::CostModel;
using simulation::Derates;

constexpr uint64_t kDefaultPrompts = 400;
constexpr uint64_t kDefaultTracePrompts = 1000;
constexpr uint64_t kMaxPrompts = 100'000;
// What a process takes of a card beside weights, activations and KV.
constexpr int64_t kContextBytes = int64_t{512} << 20;
constexpr char kCpu[] = "cpu";

absl::Status AtLeast(const char* flag, double value, double least) {
  if (value >= least) return absl::OkStatus();
  return InvalidArgument("{} must be at least {}, got {}", flag, least, value);
}

absl::Status Above0(const char* flag, const std::optional<double>& value) {
  if (!value || *value > 0) return absl::OkStatus();
  return InvalidArgument("{} must be above 0, got {}", flag, *value);
}

absl::Status IsShare(const char* flag, const std::optional<double>& value) {
  if (!value || (*value > 0 && *value <= 1)) return absl::OkStatus();
  return InvalidArgument("{} must be in (0, 1], got {}", flag, *value);
}

template <typename Named>
std::vector<std::string> NamesOf(const std::vector<Named>& all) {
  std::vector<std::string> names;
  for (const Named& one : all) names.push_back(one.name);
  return names;
}

std::string Suggest(const std::string& name, const std::vector<std::string>& names) {
  const auto nearest = NearestName(name, names);
  return nearest ? fmt::format("did you mean {}?", *nearest)
                 : fmt::format("known: {}", absl::StrJoin(names, ", "));
}

// ---- the model ----

struct Model {
  std::string name;
  ModelConfig config;
};

absl::StatusOr<Model> FindModel(const std::string& name) {
  if (const auto* known = simulation::FindModel(name)) return Model{known->name, known->config};
  if (!std::filesystem::exists(name)) {
    return InvalidArgument("--model: '{}' is neither a directory nor a model known by name; {}",
                           name, Suggest(name, NamesOf(simulation::KnownModels())));
  }
  TANDEM_RETURN_IF_ERROR(CheckModelDir("--model", name));
  TANDEM_ASSIGN_OR_RETURN(ModelConfig config, ModelConfig::Load(name));
  return Model{std::filesystem::path(name).filename().string(), std::move(config)};
}

// ---- the card and its speed ----

struct Speed {
  Card card;
  CostModel cost;
  std::string source;
  simulation::Host host;
};

absl::StatusOr<Speed> FindSpeed(const PlanFlags& flags) {
  Card card;
  card.name = flags.card.empty() ? "card" : flags.card;
  card.link_bytes_per_second = 20e9;
  if (const Card* known = simulation::FindCard(flags.card)) {
    card = *known;
  } else if (!flags.card.empty() && flags.card != kCpu) {
    std::vector<std::string> names = NamesOf(simulation::KnownCards());
    names.push_back(kCpu);
    if (!flags.read_gb || !flags.tflops || flags.memory == 0) {
      return InvalidArgument(
          "--card: '{}' is not known; {}; of another card give --bandwidth, --tflops and --memory",
          flags.card, Suggest(flags.card, names));
    }
  }
  if (flags.memory > 0) card.memory_bytes = flags.memory;
  if (flags.link_gb) card.link_bytes_per_second = *flags.link_gb * 1e9;

  std::optional<simulation::Bench> bench;
  if (!flags.bench.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.bench));
    absl::StatusOr<simulation::Bench> parsed = simulation::ParseBench(text);
    if (!parsed.ok()) {
      return InvalidArgument("--bench {}: {}", flags.bench, MessageOf(parsed.status()));
    }
    bench = *std::move(parsed);
    card.read_bytes_per_second = bench->card.read_bytes_per_second;
    card.flops = bench->card.flops;
  }
  if (flags.read_gb) card.read_bytes_per_second = *flags.read_gb * 1e9;
  if (flags.tflops) card.flops = *flags.tflops * 1e12;
  if (!(card.read_bytes_per_second > 0) || !(card.flops > 0)) {
    return InvalidArgument(
        "how fast a card is must be known: give --card, or --bandwidth and --tflops, or --bench");
  }
  if (card.memory_bytes == 0 && flags.kv_cache_bytes == 0) {
    return InvalidArgument(
        "--memory: how much a card has must be known (or --kv-cache-memory-bytes)");
  }
  Derates kept = simulation::MeasuredDerates();
  kept.read = flags.keep_read.value_or(kept.read);
  kept.product = flags.keep_product.value_or(kept.product);
  kept.attention = flags.keep_attention.value_or(kept.attention);
  if (flags.step_overhead_us) kept.fixed_seconds = *flags.step_overhead_us / 1e6;
  const CostModel roofline(card, kept);
  if (!bench) {
    return Speed{card, roofline,
                 fmt::format("data sheet, of which {:.0f} % of the bandwidth, {:.0f} % of the "
                             "products' and {:.0f} % of attention's FLOPs are kept",
                             kept.read * 100, kept.product * 100, kept.attention * 100)};
  }
  const simulation::Host host = {.cores = flags.cores,
                                 .threads = bench->threads,
                                 .read_bytes_per_second = bench->host_read_bytes_per_second};
  const CostModel fitted = CostModel::Fit(*bench, roofline);
  const simulation::ModelWork work(bench->model, bench->quantisation);
  double worst = 0;
  for (const simulation::BenchRow& row : bench->rows) {
    worst = std::max(worst, std::abs(fitted.Seconds(work, row) / row.seconds - 1));
  }
  return Speed{card, fitted,
               fmt::format("fitted to {} rows of {}, the worst of them {:.0f} % off",
                           bench->rows.size(), flags.bench, worst * 100),
               host};
}

// ---- the traffic ----

absl::StatusOr<std::vector<Conversation>> MakeConversations(const PlanFlags& flags) {
  if (flags.trace_file.empty()) {
    const int prefix = static_cast<int>(std::lround(flags.prefix_share * flags.input_len));
    const Lengths lengths{std::max(1, flags.input_len - prefix), flags.output_len,
                          flags.range_ratio, flags.seed};
    return RandomWorkload(static_cast<int>(flags.num_prompts.value_or(kDefaultPrompts)), lengths,
                          prefix, flags.num_prefixes);
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.trace_file));
  const absl::StatusOr<std::vector<TraceEntry>> trace =
      ParseTrace(text, flags.num_prompts.value_or(kDefaultTracePrompts));
  if (!trace.ok()) {
    return InvalidArgument("--trace {}: {}", flags.trace_file, MessageOf(trace.status()));
  }
  return TraceWorkload(*trace, {flags.trace_block_tokens, 1, flags.length_scale});
}

int64_t PromptTokens(const Conversation& conversation) {
  return conversation.Length() - conversation.turns[0].output_tokens;
}

void SetTraffic(const PlanFlags& flags, std::vector<Conversation> conversations, int vocab_size,
                PlanTask* task) {
  std::vector<double> arrivals;
  if (flags.trace_file.empty()) {
    arrivals = MakeArrivals({1, flags.arrival == "constant", flags.burstiness, flags.seed},
                            conversations.size());
  } else {
    for (const Conversation& conversation : conversations) arrivals.push_back(conversation.at_s);
  }
  simulation::Traffic& traffic = task->traffic;
  for (size_t i = 0; i < conversations.size(); ++i) {
    traffic.requests.push_back({absl::Seconds(arrivals[i] - arrivals[0]),
                                static_cast<int>(PromptTokens(conversations[i])),
                                conversations[i].turns[0].output_tokens});
  }
  const double span = arrivals.back() - arrivals.front();
  task->traffic_rate = span > 0 ? static_cast<double>(arrivals.size() - 1) / span : 1;
  traffic.vocab_size = vocab_size;
  traffic.prompt = [shared = std::make_shared<std::vector<Conversation>>(std::move(conversations)),
                    vocab_size, seed = flags.seed](size_t i) {
    std::vector<uint32_t> tokens;
    for (const Piece& piece : (*shared)[i].turns[0].pieces) {
      AppendTokens(piece, seed, static_cast<uint32_t>(vocab_size), &tokens);
    }
    return std::vector<int32_t>(tokens.begin(), tokens.end());
  };
}

// ---- memory ----

std::string Gigabytes(int64_t bytes) {
  return fmt::format("{:.1f} GB", static_cast<double>(bytes) / 1e9);
}

// What steps of that size need: activations of a layer and the logits.
int64_t WorkspaceBytes(const ModelConfig& config, const simulation::WorkerPlan& worker) {
  const int64_t row = 2 * (2 * int64_t{config.intermediate_size} + 4 * int64_t{config.hidden_size});
  return worker.max_num_batched_tokens * row + int64_t{worker.max_num_seqs} * config.vocab_size * 4;
}

// The KV pool of a card, in bytes.
absl::StatusOr<int64_t> KvBytes(const PlanFlags& flags, const Model& model,
                                const simulation::Quantisation& quantisation,
                                const PlanTask& task) {
  if (flags.kv_cache_bytes > 0) return flags.kv_cache_bytes;
  const auto usable =
      static_cast<int64_t>(static_cast<double>(task.card.memory_bytes) * flags.memory_utilization);
  const int64_t weights = task.model.WeightBytes();
  const DType kv_dtype = KvCacheDType(flags.kv_cache_dtype, quantisation.activations);
  const int64_t work = WorkspaceBytes(model.config, task.worker) + kContextBytes +
                       (task.card.hopper ? WidePageBytes(model.config, kv_dtype) : 0);
  const int64_t left = usable - weights - work;
  if (left > 0) return left;
  return FailedPrecondition(
      "no split of {} cards {} fits: each card holds the whole model, whose weights take {} as {} "
      "and its steps {}, and has {} of its {} to use; give a smaller --quantisation, a smaller "
      "model, or cards with more --memory",
      task.cards, task.card.name, Gigabytes(weights), quantisation.name, Gigabytes(work),
      Gigabytes(usable), Gigabytes(task.card.memory_bytes));
}

absl::Status SetWorker(const PlanFlags& flags, const Model& model,
                       const simulation::Quantisation& quantisation, PlanTask* task) {
  const bool cpu = flags.card == kCpu;
  simulation::WorkerPlan& worker = task->worker;
  worker.block_size = flags.block_size;
  worker.max_num_seqs = flags.max_num_seqs > 0 ? flags.max_num_seqs : cpu ? 64 : 256;
  worker.max_num_batched_tokens =
      std::max(worker.max_num_seqs, flags.max_num_batched_tokens > 0 ? flags.max_num_batched_tokens
                                    : cpu                            ? 512
                                                                     : 8192);
  worker.target_step = absl::Milliseconds(flags.target_step_ms >= 0 ? flags.target_step_ms
                                          : cpu                     ? 0
                                                                    : 30);
  worker.row_tile = cpu ? 1 : 256;
  worker.link_bytes_per_second = task->card.link_bytes_per_second;
  TANDEM_ASSIGN_OR_RETURN(const int64_t kv, KvBytes(flags, model, quantisation, *task));
  const int64_t tokens = kv / task->model.KvBytesPerToken();
  // Twice what a pool of so many sequences could ever hold is as good as endless.
  const int64_t blocks = std::min<int64_t>(tokens / worker.block_size, 1 << 22);
  worker.num_blocks = static_cast<int>(blocks);
  const int64_t longest =
      flags.max_model_len > 0 ? flags.max_model_len : model.config.MaxModelLen();
  worker.max_model_len = static_cast<int>(std::min(longest, blocks * worker.block_size));
  if (flags.max_model_len > 0 && worker.max_model_len < flags.max_model_len) {
    return FailedPrecondition(
        "no split fits: a sequence of --max-model-len {} tokens takes {} of KV, a card has {} for "
        "it beside the weights; give at most {}",
        flags.max_model_len, Gigabytes(flags.max_model_len * task->model.KvBytesPerToken()),
        Gigabytes(kv), worker.max_model_len);
  }
  return absl::OkStatus();
}

}  // namespace

void PlanFlags::AddTo(FlagSet* flags) {
  flags->Add("--model", &model,
             "directory with a config.json, or a name: " +
                 absl::StrJoin(NamesOf(simulation::KnownModels()), ", "));
  flags->AddChoice("--quantisation", &quantisation, NamesOf(simulation::Quantisations()),
                   "of the layers' weights; KV stays bf16 (fp32: fp32)");
  flags->AddChoice("--kv-cache-dtype", &kv_cache_dtype, kKvCacheDTypeChoices,
                   "of KV; auto: as --quantisation says; fp8: half of bf16");

  flags->Add("--card", &card,
             absl::StrJoin(NamesOf(simulation::KnownCards()), ", ") +
                 ", cpu (with --bench), or a name of your own with the figures below");
  flags->Add("--cards", &cards, "how many; each holds the whole model");
  flags->Add("--bandwidth", &read_gb, "of a card's memory, by data sheet", "GB/s");
  flags->Add("--tflops", &tflops, "dense bf16 products, by data sheet", "TFLOP/s");
  flags->AddBytes("--memory", &memory, "of a card");
  flags->Add("--link", &link_gb, "KV from card to card, each way", "GB/s");
  flags->Add("--bench", &bench,
             "engine_bench --json of this card: step times are fitted to it instead", "path");
  flags->Add("--cores", &cores,
             "cpu: of the host that all workers share; 0: each has a host of its own");
  flags->Add("--keep-bandwidth", &keep_read,
             "share of --bandwidth that steps reach; default: measured on an H200");
  flags->Add("--keep-products", &keep_product, "the same of --tflops in matrix products");
  flags->Add("--keep-attention", &keep_attention, "the same of --tflops in prompts' attention");
  flags->Add("--step-overhead", &step_overhead_us, "of each step, whatever it computes", "us");

  flags->Add("--random-input-len", &input_len, "each prompt", "tokens");
  flags->Add("--random-output-len", &output_len, "each answer", "tokens");
  flags->Add("--random-range-ratio", &range_ratio,
             "lengths are drawn evenly from 1 - this to 1 + this, times the length");
  flags->Add("--prefix-share", &prefix_share,
             "of each prompt that it shares with others, at its beginning; 0 to 1");
  flags->Add("--num-prefixes", &num_prefixes, "how many different beginnings there are");
  flags->Add("--trace", &trace_file, "Mooncake's JSON Lines instead of drawn lengths", "path");
  flags->Add("--length-scale", &length_scale, "trace: times all lengths");
  flags->Add("--trace-block-tokens", &trace_block_tokens, "trace: what a hash id stands for",
             "tokens");
  flags->Add("--request-rate", &request_rate,
             "at which the table is taken; default: 0.8 of what the best split sustains", "req/s");
  flags->AddChoice("--arrival", &arrival, {"poisson", "constant"}, "gaps between requests");
  flags->Add("--burstiness", &burstiness,
             "gamma shape of poisson's gaps: below 1 in bursts, above 1 steadier");
  flags->Add("--num-prompts", &num_prompts,
             "requests that are simulated, a third of them to warm up; default: 400, or the first "
             "1000 of a trace");
  flags->Add("--seed", &seed, "of lengths, tokens and arrivals");
  flags->AddList("--goodput", &goodput, "limits of a good request; default: ttft:1000 tpot:50",
                 "ms");

  flags->Add("--block-size", &block_size, "KV block size: 16, 32, 64, 128 or 256", "tokens");
  flags->Add("--max-model-len", &max_model_len,
             "longest sequence; 0: as long as model and memory allow", "tokens");
  flags->Add("--max-num-seqs", &max_num_seqs, "per step; 0: 256, cpu 64");
  flags->Add("--max-num-batched-tokens", &max_num_batched_tokens, "per step; 0: 8192, cpu 512",
             "tokens");
  flags->Add("--target-step-ms", &target_step_ms,
             "that prompts' chunks are cut for beside running sequences; -1: 30, cpu 0 (not cut)",
             "ms");
  flags->Add("--gpu-memory-utilization", &memory_utilization, "share of --memory for a worker");
  flags->AddBytes("--kv-cache-memory-bytes", &kv_cache_bytes,
                  "a card's KV pool; 0: what weights and workspaces leave of its memory");

  flags->Add("--search", &search, "look for the largest rate that each split sustains");
  flags->Add("--json", &json, "one JSON object instead of text");
  flags->Add("--progress", &progress, "show on stderr what is simulated, where it is a terminal");
}

absl::Status PlanFlags::Check() const {
  if (model.empty()) {
    return InvalidArgument(
        "--model is needed: a directory with a config.json, or a name such as "
        "Qwen2.5-7B");
  }
  if (cards < 1 || cards > 64) return InvalidArgument("--cards must be in [1, 64], got {}", cards);
  TANDEM_RETURN_IF_ERROR(Above0("--bandwidth", read_gb));
  TANDEM_RETURN_IF_ERROR(Above0("--tflops", tflops));
  TANDEM_RETURN_IF_ERROR(Above0("--link", link_gb));
  TANDEM_RETURN_IF_ERROR(IsShare("--keep-bandwidth", keep_read));
  TANDEM_RETURN_IF_ERROR(IsShare("--keep-products", keep_product));
  TANDEM_RETURN_IF_ERROR(IsShare("--keep-attention", keep_attention));
  TANDEM_RETURN_IF_ERROR(IsShare("--gpu-memory-utilization", memory_utilization));
  TANDEM_RETURN_IF_ERROR(AtLeast("--step-overhead", step_overhead_us.value_or(0), 0));
  TANDEM_RETURN_IF_ERROR(AtLeast("--cores", cores, 0));
  if (cores > 0 && (card != kCpu || bench.empty())) {
    return InvalidArgument("--cores needs --card cpu and --bench, whose steps share them");
  }
  TANDEM_RETURN_IF_ERROR(AtLeast("--random-input-len", input_len, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--random-output-len", output_len, 1));
  if (!(range_ratio >= 0 && range_ratio < 1)) {
    return InvalidArgument("--random-range-ratio must be in [0, 1), got {}", range_ratio);
  }
  if (!(prefix_share >= 0 && prefix_share <= 1)) {
    return InvalidArgument("--prefix-share must be in [0, 1], got {}", prefix_share);
  }
  TANDEM_RETURN_IF_ERROR(AtLeast("--num-prefixes", num_prefixes, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--trace-block-tokens", trace_block_tokens, 1));
  if (!(length_scale > 0 && length_scale <= 1000)) {
    return InvalidArgument("--length-scale must be in (0, 1000], got {}", length_scale);
  }
  TANDEM_RETURN_IF_ERROR(Above0("--request-rate", request_rate));
  TANDEM_RETURN_IF_ERROR(Above0("--burstiness", burstiness));
  if (num_prompts && (*num_prompts < 10 || *num_prompts > kMaxPrompts)) {
    return InvalidArgument("--num-prompts must be in [10, {}], got {}", kMaxPrompts, *num_prompts);
  }
  if (block_size < 16 || block_size > 256 || (block_size & (block_size - 1)) != 0) {
    return InvalidArgument("--block-size must be 16, 32, 64, 128 or 256, got {}", block_size);
  }
  TANDEM_RETURN_IF_ERROR(AtLeast("--max-model-len", max_model_len, 0));
  TANDEM_RETURN_IF_ERROR(AtLeast("--max-num-seqs", max_num_seqs, 0));
  TANDEM_RETURN_IF_ERROR(AtLeast("--max-num-batched-tokens", max_num_batched_tokens, 0));
  return absl::OkStatus();
}

absl::StatusOr<PlanTask> MakeTask(const PlanFlags& flags) {
  TANDEM_ASSIGN_OR_RETURN(const Model model, FindModel(flags.model));
  TANDEM_ASSIGN_OR_RETURN(Speed speed, FindSpeed(flags));
  const simulation::Quantisation& quantisation = *simulation::FindQuantisation(flags.quantisation);
  PlanTask task{
      .model_name = model.name,
      .model = simulation::ModelWork(model.config, quantisation,
                                     KvCacheDType(flags.kv_cache_dtype, quantisation.activations)),
      .quantisation = quantisation.name,
      .card = std::move(speed.card),
      .cards = flags.cards,
      .cost = speed.cost,
      .cost_source = std::move(speed.source)};
  task.request_rate = flags.request_rate;
  task.search = flags.search;
  TANDEM_ASSIGN_OR_RETURN(
      task.limits,
      ParseGoodput(flags.goodput.empty() ? std::vector<std::string>{"ttft:1000", "tpot:50"}
                                         : flags.goodput));
  TANDEM_RETURN_IF_ERROR(SetWorker(flags, model, quantisation, &task));
  task.worker.host = speed.host;

  TANDEM_ASSIGN_OR_RETURN(std::vector<Conversation> conversations, MakeConversations(flags));
  int64_t longest = 0;
  task.left_out = std::erase_if(conversations, [&](const Conversation& conversation) {
    longest = std::max(longest, conversation.Length());
    return conversation.Length() > task.worker.max_model_len;
  });
  if (conversations.size() < 2 || (task.left_out > 0 && flags.trace_file.empty())) {
    return FailedPrecondition(
        "no split fits: requests have up to {} tokens with their answers, and a card holds "
        "sequences of {} ({} of KV beside the weights); give shorter lengths, a smaller "
        "--quantisation, or cards with more --memory",
        longest, task.worker.max_model_len,
        Gigabytes(int64_t{task.worker.num_blocks} * task.worker.block_size *
                  task.model.KvBytesPerToken()));
  }
  SetTraffic(flags, std::move(conversations), model.config.vocab_size, &task);
  return task;
}

}  // namespace tandem::cli
