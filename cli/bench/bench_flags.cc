#include "cli/bench/bench_flags.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/time/clock.h"

#include "cli/bench/arrivals.h"
#include "cli/bench/trace.h"
#include "cli/command.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr uint64_t kDefaultPrompts = 100;
constexpr uint64_t kDefaultConcurrency = 16;
constexpr uint64_t kMaxPrompts = 10'000'000;

absl::Status AtLeast(const char* flag, double value, double least) {
  if (value >= least) return absl::OkStatus();
  return InvalidArgument("{} must be at least {}, got {}", flag, least, value);
}

absl::StatusOr<std::vector<Conversation>> MakeWorkload(const BenchFlags& flags) {
  const int count = static_cast<int>(flags.num_prompts.value_or(kDefaultPrompts));
  const Lengths lengths{flags.input_len, flags.output_len, flags.range_ratio, flags.seed};
  if (flags.scenario == "shared-prefix") {
    return RandomWorkload(count, lengths, flags.prefix_len, flags.num_prefixes);
  }
  if (flags.scenario == "two-turn") {
    return TwoTurnWorkload(count, flags.first_tokens, flags.second_tokens, lengths);
  }
  if (flags.scenario != "trace") return RandomWorkload(count, lengths);
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.trace_file));
  const absl::StatusOr<std::vector<TraceEntry>> trace =
      ParseTrace(text, static_cast<size_t>(flags.num_prompts.value_or(kMaxPrompts)));
  if (!trace.ok()) {
    return InvalidArgument("--trace {}: {}", flags.trace_file, MessageOf(trace.status()));
  }
  return TraceWorkload(*trace, {flags.trace_block_tokens,
                                flags.trace_speed > 0 ? flags.trace_speed : 1, flags.length_scale});
}

// Takes out of a trace what is too long; of what the flags describe nothing should be.
absl::Status DropTooLong(const BenchModel& model, bool trace, BenchPlan* plan) {
  if (model.max_model_len == 0) return absl::OkStatus();
  int64_t longest = 0;
  const auto too_long = [&](const Conversation& conversation) {
    longest = std::max(longest, conversation.Length());
    return conversation.Length() > int64_t{model.max_model_len};
  };
  plan->left_out = std::erase_if(plan->workload, too_long);
  if (plan->left_out > 0 && !trace) {
    return InvalidArgument(
        "a conversation has up to {} tokens with its answers, max_model_len of {} is {}; give "
        "shorter lengths",
        longest, model.id, model.max_model_len);
  }
  if (plan->workload.empty()) {
    return InvalidArgument(
        "nothing is left to send: every request is longer than max_model_len {} of {} (see "
        "--length-scale)",
        model.max_model_len, model.id);
  }
  return absl::OkStatus();
}

// Of the shapes of the first conversations, with tokens of their own (by the salt).
std::vector<Conversation> WarmUp(const std::vector<Conversation>& workload, uint64_t count) {
  std::vector<Conversation> out(
      workload.begin(),
      workload.begin() + static_cast<ptrdiff_t>(std::min<uint64_t>(count, workload.size())));
  for (Conversation& conversation : out) conversation.at_s = 0;
  return out;
}

}  // namespace

void BenchFlags::AddTo(FlagSet* flags) {
  server.AddTo(flags);
  flags->AddChoice("--api", &api, {"tandem", "openai"},
                   "what the server speaks; openai: chat completions, streamed over HTTP");
  flags->Add("--url", &url, "openai: of the server, instead of --server", "http://HOST:PORT/v1");
  flags->Add("--model", &model, "served name; default: the server's first");
  flags->AddChoice("--scenario", &scenario, {"random", "shared-prefix", "two-turn", "trace"},
                   "what is sent");
  flags->Add("--num-prompts", &num_prompts,
             "requests, or conversations of two turns; default: 100, or the whole trace");
  flags->Add("--random-input-len", &input_len, "prompt, without a shared prefix", "tokens");
  flags->Add("--random-output-len", &output_len, "each answer", "tokens");
  flags->Add("--random-range-ratio", &range_ratio,
             "lengths are drawn evenly from 1 - this to 1 + this, times the length");
  flags->Add("--prefix-len", &prefix_len, "shared-prefix: in front of each prompt", "tokens");
  flags->Add("--num-prefixes", &num_prefixes, "shared-prefix: how many different ones");
  flags->Add("--first-tokens", &first_tokens, "two-turn: prompt of the first turn", "tokens");
  flags->Add("--second-tokens", &second_tokens, "two-turn: new tokens of the second", "tokens");
  flags->Add("--trace", &trace_file, "trace: Mooncake's JSON Lines", "path");
  flags->Add("--trace-speed", &trace_speed,
             "trace: 2 replays it in half the time; 0 ignores its times (closed loop)");
  flags->Add("--length-scale", &length_scale, "trace: times all lengths");
  flags->Add("--trace-block-tokens", &trace_block_tokens, "trace: what a hash id stands for",
             "tokens");

  flags->Add("--request-rate", &request_rate,
             "open loop, whatever the server does; default, or inf: closed loop", "req/s");
  flags->AddChoice("--arrival", &arrival, {"poisson", "constant"}, "gaps of --request-rate");
  flags->Add("--burstiness", &burstiness,
             "gamma shape of poisson's gaps: below 1 in bursts, above 1 steadier");
  flags->Add("--max-concurrency", &max_concurrency,
             "at once; 0: no limit; default: 16, and no limit in an open loop", "conversations");
  flags->Add("--static-batches", &static_batches,
             "start --max-concurrency at once, and the next when the last of them has ended");
  flags->Add("--compare-static", &compare_static,
             "before the run, the same requests in static batches, to compare with");

  flags->Add("--compare-url", &compare_url,
             "before the run, the same requests to an OpenAI server, to compare with",
             "http://HOST:PORT/v1");

  flags->Add("--num-warmups", &num_warmups, "conversations sent first and not measured");
  flags->Add("--timeout", &timeout_s, "for one answer", "s");
  flags->Add("--connections", &connections, "streams are spread over these");
  flags->Add("--seed", &seed, "of tokens, lengths and arrivals");
  flags->Add("--temperature", &temperature, "0 is greedy");
  flags->Add("--ignore-eos", &ignore_eos, "answers have exactly the length asked for");
  flags->Add("--cache-salt", &cache_salt,
             "default: drawn, so that no earlier run's prefixes are found in a cache");

  flags->AddList("--goodput", &goodput, "limits of a good request, e.g. ttft:500 tpot:50", "ms");
  flags->Add("--percentile-metrics", &percentile_metrics, "shown in detail");
  flags->Add("--metric-percentiles", &metric_percentiles, "of those, e.g. 50,90,99", "%");
  flags->Add("--json", &json, "the JSON object on stdout instead of the text");
  flags->Add("--save-result", &save_result, "write the JSON object to a file as well");
  flags->Add("--save-detailed", &save_detailed, "with the lengths and times of each request");
  flags->Add("--result-dir", &result_dir, "where to", "path");
  flags->Add("--result-filename", &result_filename,
             "default: named by rate, model and date; implies --save-result");
  flags->Add("--html", &html, "write a page with plots as well; it needs nothing beside it",
             "path");
  flags->Add("--progress", &progress, "show on stderr how far the run is");
}

double BenchFlags::RequestRate() const {
  const double rate = request_rate.value_or(0);
  return std::isfinite(rate) ? rate : 0;
}

absl::Status BenchFlags::Check() const {
  if ((api == "openai") != !url.empty()) {
    return InvalidArgument("--api openai and --url http://HOST:PORT/v1 need each other");
  }
  if (num_prompts) {
    TANDEM_RETURN_IF_ERROR(AtLeast("--num-prompts", static_cast<double>(*num_prompts), 1));
    if (*num_prompts > kMaxPrompts) {
      return InvalidArgument("--num-prompts must be at most {}, got {}", kMaxPrompts, *num_prompts);
    }
  }
  TANDEM_RETURN_IF_ERROR(AtLeast("--random-input-len", input_len, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--random-output-len", output_len, 1));
  if (!(range_ratio >= 0 && range_ratio < 1)) {
    return InvalidArgument("--random-range-ratio must be in [0, 1), got {}", range_ratio);
  }
  TANDEM_RETURN_IF_ERROR(AtLeast("--prefix-len", prefix_len, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--num-prefixes", num_prefixes, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--first-tokens", first_tokens, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--second-tokens", second_tokens, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--trace-speed", trace_speed, 0));
  TANDEM_RETURN_IF_ERROR(AtLeast("--trace-block-tokens", trace_block_tokens, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--connections", connections, 1));
  TANDEM_RETURN_IF_ERROR(AtLeast("--temperature", temperature, 0));
  if (!(length_scale > 0 && length_scale <= 1000)) {
    return InvalidArgument("--length-scale must be in (0, 1000], got {}", length_scale);
  }
  if (request_rate && !(*request_rate > 0)) {
    return InvalidArgument("--request-rate must be above 0, got {}", *request_rate);
  }
  if (!(burstiness > 0)) return InvalidArgument("--burstiness must be above 0, got {}", burstiness);
  if (!(timeout_s > 0)) return InvalidArgument("--timeout must be above 0, got {}", timeout_s);
  if (max_concurrency && *max_concurrency > 1'000'000) {
    return InvalidArgument("--max-concurrency must be at most 1000000, got {}", *max_concurrency);
  }
  if ((scenario == "trace") != !trace_file.empty()) {
    return InvalidArgument("--scenario trace and --trace FILE need each other");
  }
  if (compare_static && !compare_url.empty()) {
    return InvalidArgument("--compare-static and --compare-url exclude each other");
  }
  if ((static_batches || compare_static) && max_concurrency && *max_concurrency == 0) {
    return InvalidArgument("static batches need their size: --max-concurrency");
  }
  if (static_batches && RequestRate() > 0) {
    return InvalidArgument("--static-batches and --request-rate exclude each other");
  }
  return absl::OkStatus();
}

absl::StatusOr<BenchPlan> MakePlan(const BenchFlags& flags, const BenchModel& model) {
  BenchPlan plan;
  const bool trace = flags.scenario == "trace";
  TANDEM_ASSIGN_OR_RETURN(plan.workload, MakeWorkload(flags));
  TANDEM_RETURN_IF_ERROR(DropTooLong(model, trace, &plan));
  plan.warm_up = WarmUp(plan.workload, flags.num_warmups);
  const double rate = flags.RequestRate();
  if (rate > 0) {
    const std::vector<double> arrivals = MakeArrivals(
        {rate, flags.arrival == "constant", flags.burstiness, flags.seed}, plan.workload.size());
    for (size_t i = 0; i < arrivals.size(); ++i) plan.workload[i].at_s = arrivals[i];
  }
  RunnerOptions& runner = plan.runner;
  runner.static_batches = flags.static_batches;
  runner.open_loop = rate > 0 || (trace && flags.trace_speed > 0 && !flags.static_batches);
  runner.max_concurrency =
      static_cast<int>(flags.max_concurrency.value_or(runner.open_loop ? 0 : kDefaultConcurrency));
  runner.timeout = absl::Seconds(flags.timeout_s);
  runner.seed = flags.seed;
  runner.vocab_size = std::max(1u, model.vocab_size);
  if (!flags.goodput.empty()) {
    TANDEM_ASSIGN_OR_RETURN(plan.goodput, ParseGoodput(flags.goodput));
  }
  BenchSetup& setup = plan.setup;
  TANDEM_ASSIGN_OR_RETURN(setup.metrics, ParseMetricNames(flags.percentile_metrics));
  TANDEM_ASSIGN_OR_RETURN(setup.percentiles, ParsePercentiles(flags.metric_percentiles));
  setup.date = absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::LocalTimeZone());
  setup.backend = flags.api == "openai" ? kOpenAiBackend : kTandemBackend;
  setup.model = model.id;
  setup.scenario = flags.scenario;
  setup.num_prompts = plan.workload.size();
  setup.request_rate = rate;
  setup.burstiness = flags.burstiness;
  setup.max_concurrency = runner.max_concurrency;
  setup.static_batches = runner.static_batches;
  return plan;
}

}  // namespace tandem::cli
