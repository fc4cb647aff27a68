// What pages of /metrics said, one moment after another.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace tandem::cli {

using SampleLabels = std::map<std::string, std::string>;

// One metric with its labels.
struct SampledSeries {
  SampleLabels labels;
  std::vector<double> values;  // by moment; NaN where it was not on the page
};

// Not thread-safe.
class Samples {
 public:
  // From here on pages are of this moment, in s since 1970; later than all before.
  void Begin(double time);
  // A page in Prometheus' text format; lines that are none are passed over.
  void AddPage(std::string_view page);

  const std::vector<double>& times() const { return times_; }
  // Those of one name.
  const std::vector<SampledSeries>& Of(const std::string& name) const;

 private:
  void Add(const std::string& name, SampleLabels labels, double value);

  std::vector<double> times_;
  absl::flat_hash_map<std::string, std::vector<SampledSeries>> by_name_;
  absl::flat_hash_map<std::string, size_t> places_;  // by name and labels
};

}  // namespace tandem::cli
