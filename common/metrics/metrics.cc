#include "common/metrics/metrics.h"

#include <exception>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "prometheus/exposer.h"
#include "prometheus/text_serializer.h"

#include "common/base/check.h"
#include "common/base/host_port.h"
#include "common/base/status.h"

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

}  // namespace

struct Metrics::Impl {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::string address;  // empty before Serve
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {}
Metrics::~Metrics() = default;

absl::Status Metrics::Serve(const std::string& address) {
  TANDEM_CHECK(impl_->address.empty(), "Serve is called once");
  TANDEM_ASSIGN_OR_RETURN(HostPort parsed, ParseHostPort(address));
  std::unique_ptr<prometheus::Exposer> exposer;
  try {
    exposer = std::make_unique<prometheus::Exposer>(
        std::vector<std::string>{"listening_ports", parsed.ToString(), "num_threads", "2"});
    exposer->RegisterCollectable(impl_->registry);
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

prometheus::Registry& Metrics::registry() { return *impl_->registry; }

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help,
                                      const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Counter& {
    return prometheus::BuildCounter().Name(name).Help(help).Register(*impl_->registry).Add(labels);
  });
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help,
                                  const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Gauge& {
    return prometheus::BuildGauge().Name(name).Help(help).Register(*impl_->registry).Add(labels);
  });
}

prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          const std::vector<double>& buckets,
                                          const MetricLabels& labels) {
  return RegisterOrDie(name, [&]() -> prometheus::Histogram& {
    return prometheus::BuildHistogram()
        .Name(name)
        .Help(help)
        .Register(*impl_->registry)
        .Add(labels, buckets);
  });
}

std::string Metrics::Render() const {
  return prometheus::TextSerializer().Serialize(impl_->registry->Collect());
}

const std::vector<double>& TokenGapBuckets() {
  static const auto* const buckets = new std::vector<double>(HalvedDecadeBuckets(0.0005, 10));
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
