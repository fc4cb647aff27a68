// A histogram that names for each bucket a request that is in it: the last one whose trace somebody
// keeps. OpenMetrics calls that an exemplar, and a dashboard goes from the figure to the trace.
//
// Thread-safe.
#pragma once

#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prometheus/histogram.h"

#include "common/base/trace.h"

namespace tandem {

struct Exemplar {
  Hash128 trace;
  double value = 0;
  absl::Time time;
};

class TracedHistogram {
 public:
  // `histogram` has these `bounds`, and outlives this.
  TracedHistogram(prometheus::Histogram* histogram, std::vector<double> bounds);

  // `trace` is that of the request: an exemplar if it is sampled. `now` is wall-clock time.
  void Observe(double value, const TraceContext& trace, absl::Time now);
  // One for each bound, and for what is beyond the last one.
  std::vector<std::optional<Exemplar>> Exemplars() const;

 private:
  prometheus::Histogram* const histogram_;
  const std::vector<double> bounds_;
  mutable absl::Mutex mutex_;
  std::vector<std::optional<Exemplar>> exemplars_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
