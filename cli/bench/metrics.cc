#include "cli/bench/metrics.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <utility>

#include "common/base/status.h"

namespace tandem::cli {
namespace {

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

// Of one request. Absent where it has no such thing.
std::optional<double> Ttft(const RequestRecord& record) {
  if (record.arrivals.empty()) return std::nullopt;
  return Ms(record.arrivals.front().at - record.intended);
}

std::optional<double> Tpot(const RequestRecord& record) {
  const int rest = record.output_tokens() - 1;
  if (rest < 1) return std::nullopt;
  return Ms(record.arrivals.back().at - record.arrivals.front().at) / rest;
}

bool IsGood(const RequestRecord& record, const Goodput& limits) {
  const auto within = [](const std::optional<double>& value, const std::optional<double>& limit) {
    return !limit || !value || *value <= *limit;
  };
  return within(Ttft(record), limits.ttft_ms) && within(Tpot(record), limits.tpot_ms) &&
         within(Ms(record.ended - record.intended), limits.e2el_ms);
}

size_t PeakConcurrency(std::span<const RequestRecord> records) {
  std::vector<std::pair<absl::Time, int>> changes;
  for (const RequestRecord& record : records) {
    changes.push_back({record.sent, +1});
    changes.push_back({record.ended, -1});
  }
  std::sort(changes.begin(), changes.end());  // at one moment ends come before beginnings
  int now = 0, peak = 0;
  for (const auto& [at, change] : changes) peak = std::max(peak, now += change);
  return static_cast<size_t>(peak);
}

double PeakTokensPerSecond(std::span<const RequestRecord> records) {
  std::vector<TokenArrival> all;
  for (const RequestRecord& record : records) {
    all.insert(all.end(), record.arrivals.begin(), record.arrivals.end());
  }
  std::sort(all.begin(), all.end(),
            [](const TokenArrival& a, const TokenArrival& b) { return a.at < b.at; });
  int64_t window = 0, peak = 0;
  for (size_t first = 0, last = 0; last < all.size(); ++last) {
    window += all[last].tokens;
    while (all[last].at - all[first].at >= absl::Seconds(1)) window -= all[first++].tokens;
    peak = std::max(peak, window);
  }
  return static_cast<double>(peak);
}

StageTimes MeanStages(std::span<const RequestRecord> records, size_t completed) {
  StageTimes mean;
  for (const RequestRecord& record : records) {
    if (!record.status.ok()) continue;
    for (const StageInfo& info : kStages) {
      mean[info.stage] += record.usage.stages[info.stage] / static_cast<double>(completed);
    }
  }
  return mean;
}

}  // namespace

double Percentile(std::span<const double> sorted, double p) {
  if (sorted.empty()) return 0;
  const double place = p / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], place - static_cast<double>(below));
}

Distribution Summarize(std::vector<double> values, std::span<const double> percentiles) {
  std::sort(values.begin(), values.end());
  Distribution out;
  for (const double p : percentiles) out.percentiles.push_back(Percentile(values, p));
  if (values.empty()) return out;
  const auto count = static_cast<double>(values.size());
  out.median = Percentile(values, 50);
  out.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  double squares = 0;
  for (const double value : values) squares += (value - out.mean) * (value - out.mean);
  out.deviation = std::sqrt(squares / count);
  return out;
}

absl::StatusOr<Goodput> ParseGoodput(const std::vector<std::string>& limits) {
  Goodput out;
  for (const std::string& limit : limits) {
    const size_t colon = limit.find(':');
    const std::string name = limit.substr(0, colon);
    const std::string number = colon == std::string::npos ? "" : limit.substr(colon + 1);
    double value = 0;
    const char* end = number.data() + number.size();
    const auto [stop, error] = std::from_chars(number.data(), end, value);
    if (error != std::errc() || stop != end || !(value > 0)) {
      return InvalidArgument("--goodput: '{}' is not METRIC:MILLISECONDS, e.g. ttft:500", limit);
    }
    if (name == "ttft") {
      out.ttft_ms = value;
    } else if (name == "tpot") {
      out.tpot_ms = value;
    } else if (name == "e2el") {
      out.e2el_ms = value;
    } else {
      return InvalidArgument("--goodput: '{}' is not one of ttft, tpot, e2el", name);
    }
  }
  return out;
}

BenchMetrics Measure(std::span<const RequestRecord> records, absl::Duration duration,
                     const std::optional<Goodput>& goodput, std::span<const double> percentiles) {
  BenchMetrics out;
  out.duration_s = absl::ToDoubleSeconds(duration);
  if (goodput) out.good = 0;
  std::vector<double> ttft, e2el, itl, tpot, send_delay, refusal;
  std::vector<std::vector<double>> of_turn;
  for (const RequestRecord& record : records) {
    if (!record.status.ok()) {
      Failure& failure = out.failures[absl::StatusCodeToString(record.status.code())];
      if (failure.count++ == 0) failure.example = MessageOf(record.status);
      ++out.failed;
      if (absl::IsResourceExhausted(record.status)) {
        refusal.push_back(Ms(record.ended - record.intended));
      }
      continue;
    }
    ++out.completed;
    out.input_tokens += record.prompt_tokens;
    out.cached_tokens += record.usage.cached_tokens;
    out.output_tokens += record.output_tokens();
    if (goodput && IsGood(record, *goodput)) ++*out.good;
    send_delay.push_back(Ms(record.sent - record.intended));
    e2el.push_back(Ms(record.ended - record.intended));
    if (const auto first = Ttft(record)) {
      ttft.push_back(*first);
      of_turn.resize(std::max(of_turn.size(), record.turn + 1));
      of_turn[record.turn].push_back(*first);
    }
    if (const auto each = Tpot(record)) tpot.push_back(*each);
    for (size_t i = 1; i < record.arrivals.size(); ++i) {
      itl.push_back(Ms(record.arrivals[i].at - record.arrivals[i - 1].at));
    }
  }
  out.peak_output_tokens_per_s = PeakTokensPerSecond(records);
  out.peak_concurrency = PeakConcurrency(records);
  out.stages = MeanStages(records, out.completed);
  out.ttft = Summarize(std::move(ttft), percentiles);
  out.e2el = Summarize(std::move(e2el), percentiles);
  out.itl = Summarize(std::move(itl), percentiles);
  out.tpot = Summarize(std::move(tpot), percentiles);
  out.refused = refusal.size();
  out.refusal = Summarize(std::move(refusal), percentiles);
  out.send_delay = Summarize(std::move(send_delay), percentiles);
  if (of_turn.size() > 1) {
    for (std::vector<double>& values : of_turn) {
      out.ttft_of_turn.push_back(Summarize(std::move(values), percentiles));
    }
  }
  return out;
}

}  // namespace tandem::cli
