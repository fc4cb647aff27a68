// Series from the processes' own pages of /metrics, read for some seconds.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "cli/report/samples.h"
#include "cli/report/series.h"

namespace tandem::cli {

// Not thread-safe.
class LiveSource final : public SeriesSource {
 public:
  // Reads the pages of all `addresses`, HOST:PORT, again and again for so long. UNAVAILABLE names
  // an address without a page at the beginning; one that ends later has no more points.
  static absl::StatusOr<std::unique_ptr<LiveSource>> Collect(
      const std::vector<std::string>& addresses, absl::Duration duration);

  double start() const override { return samples_.times().front(); }
  double end() const override { return samples_.times().back(); }
  double step() const override;
  absl::StatusOr<std::vector<Series>> Query(const std::string& expression) override;

 private:
  LiveSource() = default;

  Samples samples_;
};

}  // namespace tandem::cli
