#include "common/metrics/traced_histogram.h"

#include <algorithm>
#include <utility>

namespace tandem {

TracedHistogram::TracedHistogram(prometheus::Histogram* histogram, std::vector<double> bounds)
    : histogram_(histogram), bounds_(std::move(bounds)), exemplars_(bounds_.size() + 1) {}

void TracedHistogram::Observe(double value, const TraceContext& trace, absl::Time now) {
  histogram_->Observe(value);
  if (!trace.sampled) return;
  // Who finds it taken has lost nothing: an exemplar is one of many.
  if (!mutex_.TryLock()) return;
  const auto bound = std::lower_bound(bounds_.begin(), bounds_.end(), value);
  exemplars_[static_cast<size_t>(bound - bounds_.begin())] = Exemplar{trace.trace, value, now};
  mutex_.Unlock();
}

std::vector<std::optional<Exemplar>> TracedHistogram::Exemplars() const {
  absl::MutexLock lock(&mutex_);
  return exemplars_;
}

}  // namespace tandem
