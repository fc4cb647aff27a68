// Prometheus metrics of one process: a registry, its /metrics endpoint, and the shared tables of
// names and buckets.
//
// Thread-safe: counters, gauges and histograms are prometheus-cpp's own and may be updated from
// anywhere. Resolve a label child once (constructor of the owner) and keep the reference; never
// look it up per event.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/metric_family.h"

#include "common/base/pem.h"
#include "common/metrics/traced_histogram.h"

namespace tandem {

using MetricLabels = prometheus::Labels;

class Metrics {
 public:
  Metrics();
  ~Metrics();

  // Labels of everything that is registered from here on: whose numbers they are.
  void SetLabels(MetricLabels labels);
  // Collected with each page, before the families.
  void Add(std::unique_ptr<prometheus::Collectable> source);

  // Serves /metrics on HOST:PORT ("127.0.0.1:0" picks a port) until this is gone, as text or, to
  // who asks for it, as OpenMetrics. With `tls`, which says what to show and whom to believe and is
  // asked from any thread, over HTTPS. Once. Error: address in use, named.
  absl::Status Serve(const std::string& address, std::function<TlsTexts()> tls = nullptr);
  // "" before Serve.
  const std::string& address() const;

  prometheus::Counter& Counter(const std::string& name, const std::string& help,
                               const MetricLabels& labels = {});
  prometheus::Gauge& Gauge(const std::string& name, const std::string& help,
                           const MetricLabels& labels = {});
  prometheus::Histogram& Histogram(const std::string& name, const std::string& help,
                                   const std::vector<double>& buckets,
                                   const MetricLabels& labels = {});
  // One that names requests whose traces are kept; registered once for each of its labels.
  tandem::TracedHistogram& TracedHistogram(const std::string& name, const std::string& help,
                                           const std::vector<double>& buckets,
                                           const MetricLabels& labels = {});
  // What /metrics serves, and its text; as OpenMetrics where that is asked for.
  std::vector<prometheus::MetricFamily> Collect() const;
  std::string Render() const;
  std::string RenderOpenMetrics() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Bucket bounds in seconds: token gaps and steps from 0.5 ms, one millisecond wide where models are
// served (4 to 12 ms); stages from 50 us, requests up to 10 minutes.
const std::vector<double>& TokenGapBuckets();
const std::vector<double>& StageBuckets();
const std::vector<double>& RequestBuckets();
const std::vector<double>& BatchSizeBuckets();  // tokens or sequences: powers of two up to 65,536

}  // namespace tandem
