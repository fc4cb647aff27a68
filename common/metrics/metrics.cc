#include "common/metrics/metrics.h"

#include <exception>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

#include "common/base/check.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/metrics/http_page.h"
#include "common/metrics/open_metrics.h"

namespace tandem {
namespace {

// prometheus-cpp throws where a name is malformed or already taken by another type: a bug of ours,
// not input.
template <typename Make>
auto& RegisterOrDie(const std::string& name, Make make) {
  decltype(&make()) made = nullptr;
  std::string why;
  try {
    made = &make();
  } catch (const std::exception& error) {
    why = error.what();
  }
  TANDEM_CHECK(made != nullptr, "metric {}: {}", name, why);
  return *made;
}

// Each bound about twice the one before: 1, 2.5, 5 in every decade.
std::vector<double> DecadeBuckets(double from, double to) {
  std::vector<double> out;
  for (double decade = from; decade <= to; decade *= 10) {
    for (const double step : {1.0, 2.5, 5.0}) {
      if (decade * step <= to * 1.0000001) out.push_back(decade * step);
    }
  }
  return out;
}

std::vector<double> HalvedDecadeBuckets(double from, double to) {
  std::vector<double> out = {from};
  for (const double bound : DecadeBuckets(from * 2, to)) out.push_back(bound);
  return out;
}

// Everything of one page. Thread-safe.
class Page {
 public:
  prometheus::Registry& registry() { return registry_; }

  void Add(std::unique_ptr<prometheus::Collectable> source) {
    absl::MutexLock lock(&mutex_);
    sources_.push_back(std::move(source));
  }

  // `labels` are all that the histogram has.
  TracedHistogram& Add(std::string family, MetricLabels labels,
                       std::unique_ptr<TracedHistogram> histogram) {
    absl::MutexLock lock(&mutex_);
    traced_.push_back({std::move(family), std::move(labels), std::move(histogram)});
    return *traced_.back().histogram;
  }

  std::vector<prometheus::MetricFamily> Collect() const {
    std::vector<prometheus::MetricFamily> out;
    {
      absl::MutexLock lock(&mutex_);
      for (const auto& source : sources_) Append(source->Collect(), &out);
    }
    Append(registry_.Collect(), &out);
    return out;
  }

  std::string Text() const { return prometheus::TextSerializer().Serialize(Collect()); }
  std::string OpenMetrics() const {
    return OpenMetricsText(
        Collect(), [this](const std::string& family, const prometheus::ClientMetric& metric) {
          return ExemplarsOf(family, metric);
        });
  }

 private:
  struct Traced {
    std::string family;
    MetricLabels labels;
    std::unique_ptr<TracedHistogram> histogram;
  };

  std::vector<std::optional<Exemplar>> ExemplarsOf(const std::string& family,
                                                   const prometheus::ClientMetric& metric) const {
    MetricLabels labels;
    for (const auto& label : metric.label) labels.emplace(label.name, label.value);
    absl::MutexLock lock(&mutex_);
    for (const Traced& traced : traced_) {
      if (traced.family == family && traced.labels == labels) return traced.histogram->Exemplars();
    }
    return {};
  }

  static void Append(std::vector<prometheus::MetricFamily> families,
                     std::vector<prometheus::MetricFamily>* out) {
    for (auto& family : families) out->push_back(std::move(family));
  }

  prometheus::Registry registry_;
  mutable absl::Mutex mutex_;
  std::vector<std::unique_ptr<prometheus::Collectable>> sources_ ABSL_GUARDED_BY(mutex_);
  std::vector<Traced> traced_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

struct Metrics::Impl {
  Page page;
  MetricLabels labels;
  std::string address;             // empty before Serve
  std::unique_ptr<HttpPage> http;  // last: it asks for the page
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {}
Metrics::~Metrics() = default;

absl::Status Metrics::Serve(const std::string& address, std::function<TlsTexts()> tls) {
  TANDEM_CHECK(impl_->address.empty(), "Serve is called once");
  TANDEM_ASSIGN_OR_RETURN(HostPort parsed, ParseHostPort(address));
  const auto content = [page = &impl_->page](const std::string& accept) -> HttpContent {
    if (WantsOpenMetrics(accept)) return {kOpenMetricsType, page->OpenMetrics()};
    return {"text/plain; version=0.0.4; charset=utf-8", page->Text()};
  };
  TANDEM_ASSIGN_OR_RETURN(impl_->http,
                          HttpPage::Serve(parsed, "/metrics", content, std::move(tls)));
  parsed.port = impl_->http->port();
  impl_->address = parsed.ToString();
  return absl::OkStatus();
}

const std::string& Metrics::address() const { return impl_->address; }

void Metrics::SetLabels(MetricLabels labels) { impl_->labels = std::move(labels); }

void Metrics::Add(std::unique_ptr<prometheus::Collectable> source) {
  impl_->page.Add(std::move(source));
}

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help,
                                      const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Counter& {
    return prometheus::BuildCounter()
        .Name(name)
        .Help(help)
        .Labels(impl_->labels)
        .Register(impl_->page.registry())
        .Add(labels);
  });
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help,
                                  const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Gauge& {
    return prometheus::BuildGauge()
        .Name(name)
        .Help(help)
        .Labels(impl_->labels)
        .Register(impl_->page.registry())
        .Add(labels);
  });
}

prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          const std::vector<double>& buckets,
                                          const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Histogram& {
    return prometheus::BuildHistogram()
        .Name(name)
        .Help(help)
        .Labels(impl_->labels)
        .Register(impl_->page.registry())
        .Add(labels, buckets);
  });
}

TracedHistogram& Metrics::TracedHistogram(const std::string& name, const std::string& help,
                                          const std::vector<double>& buckets,
                                          const MetricLabels& labels) {
  MetricLabels all = impl_->labels;
  all.insert(labels.begin(), labels.end());
  return impl_->page.Add(
      name, std::move(all),
      std::make_unique<tandem::TracedHistogram>(&Histogram(name, help, buckets, labels), buckets));
}

std::vector<prometheus::MetricFamily> Metrics::Collect() const { return impl_->page.Collect(); }

std::string Metrics::Render() const { return impl_->page.Text(); }
std::string Metrics::RenderOpenMetrics() const { return impl_->page.OpenMetrics(); }

const std::vector<double>& TokenGapBuckets() {
  static const auto* const buckets = [] {
    auto* bounds = new std::vector<double>();
    for (const double ms : {0.5, 0.75, 1.,   1.5,  2.,   3.,    4.,    5.,    6.,    7.,  8.,
                            9.,  10.,  11.,  12.,  14.,  16.,   20.,   25.,   30.,   40., 50.,
                            75., 100., 150., 250., 500., 1000., 2500., 5000., 10000.}) {
      bounds->push_back(ms / 1000);
    }
    return bounds;
  }();
  return *buckets;
}

const std::vector<double>& StageBuckets() {
  static const auto* const buckets = new std::vector<double>(HalvedDecadeBuckets(0.00005, 100));
  return *buckets;
}

const std::vector<double>& RequestBuckets() {
  static const auto* const buckets = [] {
    auto* bounds = new std::vector<double>(DecadeBuckets(0.001, 250));
    bounds->push_back(600);
    return bounds;
  }();
  return *buckets;
}

const std::vector<double>& BatchSizeBuckets() {
  static const auto* const buckets = [] {
    auto* bounds = new std::vector<double>();
    for (int size = 1; size <= 65536; size *= 2) bounds->push_back(size);
    return bounds;
  }();
  return *buckets;
}

}  // namespace tandem
