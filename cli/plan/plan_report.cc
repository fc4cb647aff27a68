#include "cli/plan/plan_report.h"

#include "fmt/format.h"

#include "cli/table.h"

namespace tandem::cli {
namespace {

using nlohmann::ordered_json;

int64_t KvTokens(const PlanTask& task) {
  return int64_t{task.worker.num_blocks} * task.worker.block_size;
}
int64_t KvBytes(const PlanTask& task) { return KvTokens(task) * task.model.KvBytesPerToken(); }

std::string Percent(double share) { return fmt::format("{:.0f} %", share * 100); }
std::string Ms(double ms) {
  return ms < 100 ? fmt::format("{:.1f}", ms) : fmt::format("{:.0f}", ms);
}

// Mean lengths of the traffic.
std::pair<double, double> MeanLengths(const PlanTask& task) {
  double prompt = 0, answer = 0;
  for (const auto& request : task.traffic.requests) {
    prompt += request.prompt_tokens;
    answer += request.answer_tokens;
  }
  const auto count = static_cast<double>(task.traffic.requests.size());
  return {prompt / count, answer / count};
}

}  // namespace

std::string RenderPlan(const PlanTask& task, const PlanResult& result) {
  const auto [prompt, answer] = MeanLengths(task);
  std::string out;
  out += fmt::format("model    {} as {}: {:.1f} GB of weights, {:.1f} KB of KV a token\n",
                     task.model_name, task.quantisation,
                     static_cast<double>(task.model.WeightBytes()) / 1e9,
                     static_cast<double>(task.model.KvBytesPerToken()) / 1e3);
  out += fmt::format("cards    {} x {}: {:.0f} GB/s, {:.3g} TFLOP/s, link {:.3g} GB/s\n",
                     task.cards, task.card.name, task.card.read_bytes_per_second / 1e9,
                     task.card.flops / 1e12, task.worker.link_bytes_per_second / 1e9);
  out += fmt::format("memory   {:.1f} GB for KV on each: {} tokens, {:.0f} such requests\n",
                     static_cast<double>(KvBytes(task)) / 1e9, KvTokens(task),
                     static_cast<double>(KvTokens(task)) / (prompt + answer));
  out += fmt::format("steps    {}\n", task.cost_source);
  out += fmt::format(
      "traffic  {} requests, {:.0f} tokens in and {:.0f} out in the mean, {:.1f} "
      "req/min offered{}\n\n",
      task.traffic.requests.size(), prompt, answer, result.rate * 60,
      task.left_out > 0 ? fmt::format(" ({} too long, left out)", task.left_out) : "");
  std::vector<std::vector<std::string>> rows = {{"split", "TTFT p50", "p99", "ITL p50", "p99 ms",
                                                 "req/min", "tok/s", "good", "prefill busy",
                                                 "answers a card"}};
  if (task.search) rows[0].push_back("sustains req/min");
  for (const SplitFigures& figures : result.splits) {
    const BenchMetrics& metrics = figures.metrics;
    std::vector<std::string>& row = rows.emplace_back();
    row = {figures.split.Name(),
           Ms(metrics.ttft.percentiles[0]),
           Ms(metrics.ttft.percentiles[1]),
           Ms(metrics.itl.percentiles[0]),
           Ms(metrics.itl.percentiles[1]),
           fmt::format("{:.0f}", figures.requests_per_second * 60),
           fmt::format("{:.0f}", figures.tokens_per_second),
           Percent(figures.good_share),
           figures.split.unified > 0 ? "-" : Percent(figures.prefill_busy),
           fmt::format("{:.0f}", figures.answers_a_card)};
    if (task.search) row.push_back(fmt::format("{:.0f}", figures.sustains * 60));
  }
  return out + RenderTable(rows) + "\n" + result.why + " (Simulated.)\n";
}

ordered_json PlanJson(const PlanTask& task, const PlanResult& result) {
  ordered_json out = {{"simulated", true},
                      {"model", task.model_name},
                      {"quantisation", task.quantisation},
                      {"card", task.card.name},
                      {"cards", task.cards},
                      {"cost_model", task.cost_source},
                      {"weight_bytes", task.model.WeightBytes()},
                      {"kv_bytes", KvBytes(task)},
                      {"kv_tokens", KvTokens(task)},
                      {"max_model_len", task.worker.max_model_len},
                      {"num_prompts", task.traffic.requests.size()},
                      {"left_out", task.left_out},
                      {"request_rate", result.rate}};
  for (const auto& [name, limit] : {std::pair{"ttft", task.limits.ttft_ms},
                                    {"tpot", task.limits.tpot_ms},
                                    {"e2el", task.limits.e2el_ms}}) {
    if (limit) out["goodput"][name] = *limit;
  }
  for (const SplitFigures& figures : result.splits) {
    const BenchMetrics& metrics = figures.metrics;
    ordered_json split = {{"split", figures.split.Name()},  {"prefill", figures.split.prefill},
                          {"decode", figures.split.decode}, {"unified", figures.split.unified},
                          {"completed", metrics.completed}, {"failed", metrics.failed}};
    const auto add = [&split](const std::string& name, const Distribution& values) {
      split["mean_" + name + "_ms"] = values.mean;
      split["p50_" + name + "_ms"] = values.percentiles[0];
      split["p99_" + name + "_ms"] = values.percentiles[1];
    };
    add("ttft", metrics.ttft);
    add("tpot", metrics.tpot);
    add("itl", metrics.itl);
    add("e2el", metrics.e2el);
    split["total_cached_tokens"] = metrics.cached_tokens;
    split["request_throughput"] = figures.requests_per_second;
    split["output_throughput"] = figures.tokens_per_second;
    split["good_share"] = figures.good_share;
    split["prefill_busy"] = figures.prefill_busy;
    split["answers_a_card"] = figures.answers_a_card;
    if (task.search) split["sustained_request_rate"] = figures.sustains;
    out["splits"].push_back(std::move(split));
  }
  out["run"] = result.splits[result.best].split.Name();
  out["why"] = result.why;
  return out;
}

}  // namespace tandem::cli
