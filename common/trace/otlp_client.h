// Sends spans to an OpenTelemetry collector by OTLP over gRPC, from a thread of its own: a slow or
// absent collector costs memory up to a bound, then spans, and never a request's time.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/trace.h"
#include "common/config/trace_flags.h"
#include "common/trace/trace_metrics.h"

namespace tandem {

struct OtlpOptions {
  std::string endpoint;                       // HOST:PORT of the collector, without TLS
  LogFields resource;                         // what the spans are of: service.name, ...
  size_t max_waiting = 8192;                  // spans; about 1 KB each
  size_t batch = 512;                         // spans, in one call
  absl::Duration delay = absl::Seconds(1);    // the longest that a batch is waited for
  absl::Duration timeout = absl::Seconds(2);  // of one call
  absl::Duration backoff = absl::Seconds(1);  // before a call is tried again, then twice as long
  int tries = 3;                              // until a batch is given up
};

class OtlpClient final : public SpanSink {
 public:
  // `metrics` outlives the client. Nobody need be there yet.
  OtlpClient(OtlpOptions options, Metrics* metrics);
  // Sends what waits, if the collector takes it at once.
  ~OtlpClient() override;

  void Add(std::vector<Span> spans) override;

 private:
  class Collector;

  void Run();
  // Waits for a batch; empty: there is none, and never will be.
  std::vector<Span> Next();
  // False: they are lost.
  bool Send(const std::vector<Span>& batch);
  bool HasBatch() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return waiting_.size() >= options_.batch || stopping_;
  }
  bool HasSpans() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !waiting_.empty() || stopping_;
  }
  bool Stopping() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_; }

  const OtlpOptions options_;
  TraceMetrics metrics_;
  const std::unique_ptr<Collector> collector_;
  absl::Mutex mutex_;
  std::deque<Span> waiting_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// What the process `service` ("tandem_router") named `instance` sends its spans to; null where the
// flags name no collector.
std::unique_ptr<SpanSink> StartTracing(const TraceOptions& options, const std::string& service,
                                       const std::string& instance, Metrics* metrics);

}  // namespace tandem
