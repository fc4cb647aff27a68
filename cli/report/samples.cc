#include "cli/report/samples.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace tandem::cli {
namespace {

constexpr double kNotThere = std::numeric_limits<double>::quiet_NaN();

// What stands between quotes from `at` on, which is moved behind them.
std::string TakeQuoted(std::string_view text, size_t* at) {
  std::string out;
  for (++*at; *at < text.size() && text[*at] != '"'; ++*at) {
    if (text[*at] == '\\' && *at + 1 < text.size()) {
      const char escaped = text[++*at];
      out += escaped == 'n' ? '\n' : escaped;
    } else {
      out += text[*at];
    }
  }
  ++*at;
  return out;
}

}  // namespace

void Samples::Begin(double time) { times_.push_back(time); }

const std::vector<SampledSeries>& Samples::Of(const std::string& name) const {
  static const std::vector<SampledSeries> kNone;
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? kNone : found->second;
}

void Samples::AddPage(std::string_view page) {
  for (size_t begin = 0; begin < page.size();) {
    const size_t end = std::min(page.find('\n', begin), page.size());
    const std::string_view line = page.substr(begin, end - begin);
    begin = end + 1;
    const size_t name_end = line.find_first_of("{ ");
    if (line.starts_with('#') || name_end == std::string_view::npos || name_end == 0) continue;
    SampleLabels labels;
    size_t at = name_end;
    if (line[at] == '{') {
      ++at;
      while (at < line.size() && line[at] != '}') {
        const size_t equals = line.find("=\"", at);
        if (equals == std::string_view::npos) break;
        const std::string name(line.substr(at, equals - at));
        at = equals + 1;
        labels[name] = TakeQuoted(line, &at);
        if (at < line.size() && line[at] == ',') ++at;
      }
      ++at;
    }
    if (at >= line.size()) continue;
    const std::string number(line.substr(at));
    char* stop = nullptr;
    const double value = std::strtod(number.c_str(), &stop);
    if (stop != number.c_str())
      Add(std::string(line.substr(0, name_end)), std::move(labels), value);
  }
}

void Samples::Add(const std::string& name, SampleLabels labels, double value) {
  std::string key = name;
  for (const auto& [label, text] : labels) key += '\0' + label + '\0' + text;
  std::vector<SampledSeries>& all = by_name_[name];
  const auto [place, added] = places_.emplace(key, all.size());
  if (added) all.push_back({std::move(labels), {}});
  std::vector<double>& values = all[place->second].values;
  values.resize(times_.size(), kNotThere);
  values.back() = value;
}

}  // namespace tandem::cli
