// An OpenTelemetry collector in the test's process.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/rpc/server.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"

namespace tandem {

// A span as it came; ids in hex.
struct CollectedSpan {
  std::string service;   // service.name
  std::string instance;  // service.instance.id
  std::string name;
  std::string trace;
  std::string id;
  std::string parent;  // "" for none
  std::string state;   // W3C's tracestate
  opentelemetry::proto::trace::v1::Span::SpanKind kind = {};
  double start = 0;  // s, since 1970
  double end = 0;
  bool error = false;
  std::map<std::string, std::string> attributes;
};
// For failure messages.
std::string ToText(const std::vector<CollectedSpan>& spans);

// Thread-safe.
class OtlpCollector final
    : public opentelemetry::proto::collector::trace::v1::TraceService::CallbackService {
 public:
  using Request = opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;
  using Response = opentelemetry::proto::collector::trace::v1::ExportTraceServiceResponse;

  // On HOST:PORT; null, with a gtest failure, if it cannot listen.
  static std::unique_ptr<OtlpCollector> Start(const std::string& address = "127.0.0.1:0");
  ~OtlpCollector() override;

  const std::string& address() const { return server_->address(); }
  // The next calls are answered so, their spans forgotten.
  void Answer(grpc::Status status);
  // Calls answered so far, and the most spans of one.
  int calls() const;
  size_t largest() const;
  // All, or those of one trace, in order of their start.
  std::vector<CollectedSpan> spans(const std::string& trace = "") const;
  // Polls spans(trace) until `condition` holds for them.
  bool WaitFor(const std::string& trace,
               const std::function<bool(const std::vector<CollectedSpan>&)>& condition,
               double seconds) const;

  grpc::ServerUnaryReactor* Export(grpc::CallbackServerContext* context, const Request* request,
                                   Response* response) override;

 private:
  std::unique_ptr<RpcServer> server_;
  mutable absl::Mutex mutex_;
  grpc::Status answer_ ABSL_GUARDED_BY(mutex_);
  int calls_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t largest_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<CollectedSpan> spans_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
