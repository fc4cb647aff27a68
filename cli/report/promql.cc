#include "cli/report/promql.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <regex>
#include <string_view>
#include <utility>

#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr double kNoValue = std::numeric_limits<double>::quiet_NaN();

struct Value {
  std::vector<SampledSeries> series;
  bool scalar = false;  // one series, which goes with any other
};

// Reads and evaluates at once: no expression is evaluated twice. The first error ends it.
class Evaluation {
 public:
  Evaluation(std::string_view text, const Samples& samples) : text_(text), samples_(samples) {}

  absl::StatusOr<std::vector<SampledSeries>> Run() {
    Value value = Sum();
    Skip();
    if (error_.ok() && at_ < text_.size()) Expected("an end");
    if (!error_.ok()) return error_;
    return std::move(value.series);
  }

 private:
  size_t moments() const { return samples_.times().size(); }

  // ---- reading ----
  void Skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  bool Take(char c) {
    Skip();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void Need(char c) {
    if (!Take(c)) Expected(std::string("'") + c + "'");
  }
  void Expected(const std::string& what) {
    if (error_.ok()) {
      error_ = InvalidArgument("'{}': expected {} at character {}", text_, what, at_ + 1);
    }
    at_ = text_.size();
  }
  std::string Word() {
    Skip();
    const size_t begin = at_;
    const auto part = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == ':';
    };
    while (at_ < text_.size() && part(text_[at_])) ++at_;
    return std::string(text_.substr(begin, at_ - begin));
  }
  std::string Quoted() {
    std::string out;
    Need('"');
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\' && at_ + 1 < text_.size()) ++at_;
      out += text_[at_++];
    }
    Need('"');
    return out;
  }

  // ---- expressions ----
  Value Sum() {
    Value left = Product();
    while (error_.ok()) {
      if (Take('+')) {
        left = Combine(left, Product(), [](double a, double b) { return a + b; });
      } else if (Take('-')) {
        left = Combine(left, Product(), [](double a, double b) { return a - b; });
      } else {
        break;
      }
    }
    return left;
  }
  Value Product() {
    Value left = Factor();
    while (error_.ok()) {
      if (Take('*')) {
        left = Combine(left, Factor(), [](double a, double b) { return a * b; });
      } else if (Take('/')) {
        left = Combine(left, Factor(), [](double a, double b) { return a / b; });
      } else {
        break;
      }
    }
    return left;
  }
  Value Factor() {
    Skip();
    if (Take('(')) {
      Value value = Sum();
      Need(')');
      return value;
    }
    if (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_]))) return Number();
    const std::string word = Word();
    if (word.empty()) {
      Expected("an expression");
      return {};
    }
    if (word == "sum" || word == "max" || word == "avg" || word == "count") return Aggregate(word);
    Skip();
    if (at_ < text_.size() && text_[at_] == '(') return Function(word);
    return Selector(word);
  }
  Value Number() {
    const std::string rest(text_.substr(at_));
    char* stop = nullptr;
    const double number = std::strtod(rest.c_str(), &stop);
    at_ += static_cast<size_t>(stop - rest.c_str());
    return Scalar(std::vector<double>(moments(), number));
  }
  static Value Scalar(std::vector<double> values) {
    Value out;
    out.series.push_back({{}, std::move(values)});
    out.scalar = true;
    return out;
  }

  Value Function(const std::string& name) {
    Need('(');
    Value out;
    if (name == "time") {
      out = Scalar(samples_.times());
    } else if (name == "rate" || name == "increase") {
      out = Growth(Factor(), /*per_second=*/name == "rate");
    } else if (name == "histogram_quantile") {
      const Value quantile = Sum();
      Need(',');
      const Value buckets = Sum();
      if (!quantile.scalar || moments() == 0) Expected("a number");
      if (error_.ok()) out = Quantile(quantile.series[0].values[0], buckets);
    } else if (name == "clamp_min") {
      const Value value = Sum();
      Need(',');
      out = Combine(value, Sum(), [](double a, double b) { return std::max(a, b); });
    } else {
      Expected("a function that is known here, not " + name);
    }
    Need(')');
    return out;
  }

  Value Selector(const std::string& name) {
    struct Matcher {
      std::string label;
      std::string text;
      std::regex pattern;
      bool is_pattern = false;
      bool wanted = true;
    };
    std::vector<Matcher> matchers;
    if (Take('{')) {
      while (error_.ok() && !Take('}')) {
        Matcher matcher;
        matcher.label = Word();
        matcher.wanted = !Take('!');
        const bool equals = Take('=');
        matcher.is_pattern = Take('~');
        if (!equals && (matcher.wanted || !matcher.is_pattern)) Expected("a matcher");
        matcher.text = Quoted();
        if (matcher.text.starts_with('$')) matcher.text = ".*";
        if (matcher.is_pattern) matcher.pattern = std::regex(matcher.text);
        matchers.push_back(std::move(matcher));
        Take(',');
      }
    }
    if (Take('[')) {
      at_ = std::min(text_.find(']', at_), text_.size());
      Need(']');
    }
    Value out;
    for (const SampledSeries& series : samples_.Of(name)) {
      const auto matches = [&series](const Matcher& matcher) {
        const auto label = series.labels.find(matcher.label);
        const std::string value = label == series.labels.end() ? "" : label->second;
        const bool same =
            matcher.is_pattern ? std::regex_match(value, matcher.pattern) : value == matcher.text;
        return same == matcher.wanted;
      };
      if (!std::all_of(matchers.begin(), matchers.end(), matches)) continue;
      out.series.push_back(series);
      out.series.back().values.resize(moments(), kNoValue);
    }
    return out;
  }

  Value Aggregate(const std::string& how) {
    std::vector<std::string> by;
    Skip();
    if (at_ < text_.size() && text_[at_] != '(') {
      if (Word() != "by") Expected("by");
      Need('(');
      while (error_.ok() && !Take(')')) {
        by.push_back(Word());
        Take(',');
      }
    }
    Need('(');
    const Value value = Sum();
    Need(')');
    std::map<SampleLabels, std::vector<const SampledSeries*>> groups;
    for (const SampledSeries& series : value.series) {
      SampleLabels key;
      for (const std::string& label : by) {
        const auto found = series.labels.find(label);
        if (found != series.labels.end()) key.insert(*found);
      }
      groups[key].push_back(&series);
    }
    Value out;
    for (const auto& [labels, members] : groups) {
      SampledSeries group{labels, std::vector<double>(moments(), kNoValue)};
      for (size_t i = 0; i < moments(); ++i) group.values[i] = Aggregated(how, members, i);
      out.series.push_back(std::move(group));
    }
    return out;
  }
  static double Aggregated(const std::string& how, const std::vector<const SampledSeries*>& members,
                           size_t moment) {
    double sum = 0, most = -HUGE_VAL, count = 0;
    for (const SampledSeries* series : members) {
      const double value = series->values[moment];
      if (std::isnan(value)) continue;
      sum += value;
      most = std::max(most, value);
      ++count;
    }
    if (count == 0) return kNoValue;
    return how == "sum" ? sum : how == "max" ? most : how == "avg" ? sum / count : count;
  }

  // Of counters: since some moments before, or since they were first seen.
  Value Growth(Value value, bool per_second) const {
    for (SampledSeries& series : value.series) {
      const std::vector<double> values = std::exchange(series.values, {});
      for (size_t i = 0; i < values.size(); ++i) {
        const size_t before = i < kRateMoments ? 0 : i - kRateMoments;
        const double seconds = samples_.times()[i] - samples_.times()[before];
        double growth = kNoValue;
        // One that was not there yet began at 0, as did one that is less than it was.
        if (i > 0) growth = values[i] - (values[before] <= values[i] ? values[before] : 0);
        series.values.push_back(per_second ? growth / seconds : growth);
      }
    }
    return value;
  }

  // As Prometheus has it: by straight line within a bucket.
  Value Quantile(double quantile, const Value& buckets) const {
    std::map<SampleLabels, std::map<double, const SampledSeries*>> histograms;
    for (const SampledSeries& series : buckets.series) {
      const auto le = series.labels.find("le");
      if (le == series.labels.end()) continue;
      SampleLabels labels = series.labels;
      labels.erase("le");
      const double bound =
          le->second == "+Inf" ? HUGE_VAL : std::strtod(le->second.c_str(), nullptr);
      histograms[labels][bound] = &series;
    }
    Value out;
    for (const auto& [labels, histogram] : histograms) {
      SampledSeries series{labels, {}};
      for (size_t i = 0; i < moments(); ++i) {
        series.values.push_back(QuantileAt(quantile, histogram, i));
      }
      out.series.push_back(std::move(series));
    }
    return out;
  }
  static double QuantileAt(double quantile, const std::map<double, const SampledSeries*>& histogram,
                           size_t moment) {
    const double total = histogram.rbegin()->second->values[moment];
    if (!(total > 0)) return kNoValue;
    const double rank = quantile * total;
    double below = 0, low = 0;
    for (const auto& [bound, series] : histogram) {
      const double count = series->values[moment];
      if (count >= rank) {
        if (std::isinf(bound)) return low;
        return low + (bound - low) * (count > below ? (rank - below) / (count - below) : 1);
      }
      below = count;
      low = bound;
    }
    return low;
  }

  template <typename Operation>
  Value Combine(const Value& left, const Value& right, Operation operation) const {
    Value out;
    out.scalar = left.scalar && right.scalar;
    for (const SampledSeries& a : left.series) {
      for (const SampledSeries& b : right.series) {
        if (!left.scalar && !right.scalar && a.labels != b.labels) continue;
        SampledSeries both{left.scalar ? b.labels : a.labels, {}};
        for (size_t i = 0; i < moments(); ++i) {
          // max(NaN, 0) would be a value.
          const bool there = !std::isnan(a.values[i]) && !std::isnan(b.values[i]);
          both.values.push_back(there ? operation(a.values[i], b.values[i]) : kNoValue);
        }
        out.series.push_back(std::move(both));
      }
    }
    return out;
  }

  const std::string_view text_;
  const Samples& samples_;
  size_t at_ = 0;
  absl::Status error_;
};

}  // namespace

absl::StatusOr<std::vector<SampledSeries>> EvaluatePromQl(const std::string& expression,
                                                          const Samples& samples) {
  return Evaluation(expression, samples).Run();
}

}  // namespace tandem::cli
