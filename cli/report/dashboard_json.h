// deploy/dashboards/tandem-latency.json; the build writes the source.
#pragma once

namespace tandem::cli {

extern const char kLatencyDashboardJson[];

}  // namespace tandem::cli
