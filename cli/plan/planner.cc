#include "cli/plan/planner.h"

#include <algorithm>
#include <cmath>

#include "fmt/format.h"

namespace tandem::cli {
namespace {

using simulation::Answer;
using simulation::Outcome;
using simulation::Split;

constexpr double kShownShare = 0.8;  // of the best sustained rate, where none was asked for
constexpr int kHalvings = 5;         // of a factor of two: the rate is found within 2 %
constexpr int kLeastRate = 12;       // halvings of the first guess
constexpr double kSame = 0.03;       // sustained rates that differ by less count as equal

// A third to fill the cluster, and a tenth to keep it full.
simulation::Window WindowOf(size_t requests) {
  const size_t last = std::max<size_t>(1, requests - requests / 10);
  return {std::min(requests / 3, last - 1), last};
}

simulation::Traffic AtRate(const PlanTask& task, double rate) {
  simulation::Traffic traffic = task.traffic;
  for (auto& request : traffic.requests) request.due *= task.traffic_rate / rate;
  return traffic;
}

RequestRecord ToRecord(const Answer& answer) {
  const absl::Time start = absl::UnixEpoch();
  RequestRecord record;
  record.intended = record.sent = start + answer.due;
  for (const absl::Duration at : answer.arrivals) record.arrivals.push_back({start + at, 1});
  record.ended = start + answer.ended;
  record.status = answer.status;
  record.prompt_tokens = answer.prompt_tokens;
  record.usage.cached_tokens = answer.cached_tokens;
  return record;
}

bool IsGood(const Answer& answer, const Goodput& limits) {
  const RequestRecord record = ToRecord(answer);
  const BenchMetrics one = Measure({&record, 1}, absl::Seconds(1), limits, {});
  return one.good.value_or(0) == 1;
}

class Planner {
 public:
  Planner(const PlanTask& task, const PlanProgress& progress) : task_(task), progress_(progress) {}

  PlanResult Make() {
    PlanResult result;
    for (const Split& split : simulation::SplitsOf(task_.cards)) {
      SplitFigures& figures = result.splits.emplace_back();
      figures.split = split;
      if (task_.search) figures.sustains = LargestRate(split);
    }
    double best = 0;
    for (const SplitFigures& figures : result.splits) best = std::max(best, figures.sustains);
    result.rate = task_.request_rate.value_or(best > 0 ? kShownShare * best : task_.traffic_rate);
    for (SplitFigures& figures : result.splits) Fill(&figures, result.rate);
    Choose(&result);
    return result;
  }

 private:
  // ---- simulate ----
  bool Sustains(const Split& split, double rate) {
    const simulation::Traffic traffic = AtRate(task_, rate);
    const simulation::Window window = WindowOf(traffic.requests.size());
    const auto most_bad =
        static_cast<size_t>((1 - kGoodShare) * static_cast<double>(window.last - window.first));
    size_t bad = 0;
    simulation::Serve(split, task_.worker, task_.cost, task_.model, traffic, window,
                      [&, ended = size_t{0}](const Answer& answer) mutable {
                        Show(split, rate, ++ended, window.last - window.first);
                        bad += IsGood(answer, task_.limits) ? 0 : 1;
                        return bad <= most_bad;
                      });
    return bad <= most_bad;
  }

  double LargestRate(const Split& split) {
    // What the prompts alone would allow.
    double tokens = 0;
    for (const auto& request : task_.traffic.requests) tokens += request.prompt_tokens;
    simulation::StepShape prompt;
    prompt.Add(0, static_cast<int>(tokens / static_cast<double>(task_.traffic.requests.size())),
               true);
    double rate = (split.prefill + split.unified) / task_.cost.Seconds(task_.model, prompt) / 2;
    double low = 0, high = 0;
    for (int i = 0; (low == 0 || high == 0) && i < kLeastRate; ++i) {
      if (Sustains(split, rate)) {
        low = rate;
        rate *= 2;
      } else {
        high = rate;
        rate /= 2;
      }
    }
    for (int i = 0; low > 0 && high > 0 && i < kHalvings; ++i) {
      const double middle = std::sqrt(low * high);
      (Sustains(split, middle) ? low : high) = middle;
    }
    return low;
  }

  void Fill(SplitFigures* figures, double rate) {
    const simulation::Traffic traffic = AtRate(task_, rate);
    const simulation::Window window = WindowOf(traffic.requests.size());
    const Outcome outcome =
        simulation::Serve(figures->split, task_.worker, task_.cost, task_.model, traffic, window,
                          [&, ended = size_t{0}](const Answer&) mutable {
                            Show(figures->split, rate, ++ended, window.last - window.first);
                            return true;
                          });
    std::vector<RequestRecord> records;
    for (const Answer& answer : outcome.answers) records.push_back(ToRecord(answer));
    const std::vector<double> percentiles = {50, 99};
    figures->metrics = Measure(records, outcome.simulated, task_.limits, percentiles);
    figures->good_share = static_cast<double>(figures->metrics.good.value_or(0)) /
                          static_cast<double>(records.size());
    figures->requests_per_second = outcome.requests_per_second;
    figures->tokens_per_second = outcome.tokens_per_second;
    figures->prefill_busy = outcome.prefill_busy;
    figures->answers_a_card = outcome.tokens_per_second * figures->metrics.itl.mean / 1e3 /
                              (figures->split.decode + figures->split.unified);
  }

  void Show(const Split& split, double rate, size_t ended, size_t total) {
    if (!progress_) return;
    progress_(fmt::format("{} at {:.2f} req/s: {}/{}", split.Name(), rate, ended, total));
  }

  // ---- choose ----
  // Whether `a` serves better than `b`.
  static bool IsBetter(const SplitFigures& a, const SplitFigures& b) {
    if (std::abs(a.sustains - b.sustains) > kSame * std::max(a.sustains, b.sustains)) {
      return a.sustains > b.sustains;
    }
    if (std::abs(a.good_share - b.good_share) > kSame) return a.good_share > b.good_share;
    return a.metrics.ttft.percentiles[1] + a.metrics.e2el.median <
           b.metrics.ttft.percentiles[1] + b.metrics.e2el.median;
  }

  void Choose(PlanResult* result) const {
    std::vector<SplitFigures>& splits = result->splits;
    for (size_t i = 1; i < splits.size(); ++i) {
      if (IsBetter(splits[i], splits[result->best])) result->best = i;
    }
    const SplitFigures& best = splits[result->best];
    const SplitFigures* second = nullptr;
    for (const SplitFigures& other : splits) {
      if (&other == &best) continue;
      if (second == nullptr || IsBetter(other, *second)) second = &other;
    }
    const std::string within = DescribeLimits();
    std::string why;
    if (best.sustains > 0) {
      why = fmt::format("it sustains {:.0f} req/min within {}", best.sustains * 60, within);
      if (second != nullptr && second->sustains > 0) {
        const double more = best.sustains / second->sustains - 1;
        why += more > kSame
                   ? fmt::format(", {:.0f} % more than {}", more * 100, second->split.Name())
                   : fmt::format(", as many as {}, with a TTFT p99 of {:.0f} ms against {:.0f}",
                                 second->split.Name(), best.metrics.ttft.percentiles[1],
                                 second->metrics.ttft.percentiles[1]);
      }
    } else if (task_.search) {
      why = fmt::format("no split stays within {} at any rate, and this one comes closest", within);
    } else {
      why = fmt::format("{:.0f} % of its requests stay within {}", best.good_share * 100, within);
    }
    why += fmt::format("; at {:.0f} req/min ", result->rate * 60);
    if (best.split.prefill > 0) {
      why += fmt::format("its prefill cards are busy for {:.0f} % of the time, and ",
                         best.prefill_busy * 100);
    }
    why += fmt::format("a card draws {:.0f} answers at once", best.answers_a_card);
    if (best.sustains > 0 && result->rate > best.sustains * (1 + kSame)) {
      why += fmt::format(", and {:.0f} req/min is more than it sustains", result->rate * 60);
    }
    result->why = fmt::format("Run {}: {}.", best.split.Name(), why);
  }

  std::string DescribeLimits() const {
    std::string out;
    const auto add = [&out](const char* name, const std::optional<double>& limit) {
      if (!limit) return;
      out += fmt::format("{}{} {:g} ms", out.empty() ? "" : " and ", name, *limit);
    };
    add("TTFT", task_.limits.ttft_ms);
    add("TPOT", task_.limits.tpot_ms);
    add("E2EL", task_.limits.e2el_ms);
    return out;
  }

  const PlanTask& task_;
  const PlanProgress& progress_;
};

}  // namespace

PlanResult FindBestSplit(const PlanTask& task, const PlanProgress& progress) {
  return Planner(task, progress).Make();
}

}  // namespace tandem::cli
