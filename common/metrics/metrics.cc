#include "common/metrics/metrics.h"

#include <exception>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "prometheus/exposer.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

#include "common/base/check.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/metrics/https_page.h"

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

// The servers of this process, which live as long as it does: civetweb takes up to 2 s to notice
// that it shall stop, and a process that has said that it ends must not wait for that. A server
// knows its registry weakly, so after its Metrics are gone it serves an empty page.
void KeepForGood(std::unique_ptr<prometheus::Exposer> exposer) {
  static absl::Mutex mutex(absl::kConstInit);
  static auto* const kept = new std::vector<std::unique_ptr<prometheus::Exposer>>();
  absl::MutexLock lock(&mutex);
  kept->push_back(std::move(exposer));
}

// Everything of one page. Shared with the server, which asks for it in threads of its own.
class Page final : public prometheus::Collectable {
 public:
  prometheus::Registry& registry() { return registry_; }

  void Add(std::unique_ptr<prometheus::Collectable> source) {
    absl::MutexLock lock(&mutex_);
    sources_.push_back(std::move(source));
  }

  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> out;
    {
      absl::MutexLock lock(&mutex_);
      for (const auto& source : sources_) Append(source->Collect(), &out);
    }
    Append(registry_.Collect(), &out);
    return out;
  }

 private:
  static void Append(std::vector<prometheus::MetricFamily> families,
                     std::vector<prometheus::MetricFamily>* out) {
    for (auto& family : families) out->push_back(std::move(family));
  }

  prometheus::Registry registry_;
  mutable absl::Mutex mutex_;
  std::vector<std::unique_ptr<prometheus::Collectable>> sources_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

struct Metrics::Impl {
  std::shared_ptr<Page> page = std::make_shared<Page>();
  MetricLabels labels;
  std::string address;               // empty before Serve
  std::unique_ptr<HttpsPage> https;  // null: it is served in the clear
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {}
Metrics::~Metrics() = default;

absl::Status Metrics::Serve(const std::string& address, std::function<TlsTexts()> tls) {
  TANDEM_CHECK(impl_->address.empty(), "Serve is called once");
  TANDEM_ASSIGN_OR_RETURN(HostPort parsed, ParseHostPort(address));
  if (tls) {
    TANDEM_ASSIGN_OR_RETURN(impl_->https,
                            HttpsPage::Serve(
                                parsed, "/metrics", "text/plain; version=0.0.4; charset=utf-8",
                                [page = impl_->page] {
                                  return prometheus::TextSerializer().Serialize(page->Collect());
                                },
                                std::move(tls)));
    parsed.port = impl_->https->port();
    impl_->address = parsed.ToString();
    return absl::OkStatus();
  }
  std::unique_ptr<prometheus::Exposer> exposer;
  try {
    exposer = std::make_unique<prometheus::Exposer>(
        std::vector<std::string>{"listening_ports", parsed.ToString(), "num_threads", "2"});
    exposer->RegisterCollectable(impl_->page);
    const std::vector<int> ports = exposer->GetListeningPorts();
    if (!ports.empty()) parsed.port = ports.front();
  } catch (const std::exception&) {
    // civetweb's message does not say why.
    return Unavailable("cannot serve metrics on {}: {}", address, WhyCannotListen(address));
  }
  KeepForGood(std::move(exposer));
  impl_->address = parsed.ToString();
  return absl::OkStatus();
}

const std::string& Metrics::address() const { return impl_->address; }

void Metrics::SetLabels(MetricLabels labels) { impl_->labels = std::move(labels); }

void Metrics::Add(std::unique_ptr<prometheus::Collectable> source) {
  impl_->page->Add(std::move(source));
}

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help,
                                      const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Counter& {
    return prometheus::BuildCounter()
        .Name(name)
        .Help(help)
        .Labels(impl_->labels)
        .Register(impl_->page->registry())
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
        .Register(impl_->page->registry())
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
        .Register(impl_->page->registry())
        .Add(labels, buckets);
  });
}

std::vector<prometheus::MetricFamily> Metrics::Collect() const { return impl_->page->Collect(); }

std::string Metrics::Render() const { return prometheus::TextSerializer().Serialize(Collect()); }

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
