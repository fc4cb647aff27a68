#include "common/trace/otlp_client.h"

#include <algorithm>
#include <iterator>
#include <pthread.h>
#include <utility>

#include "absl/time/clock.h"
#include "grpcpp/grpcpp.h"
#include "spdlog/spdlog.h"

#include "common/base/log_limiter.h"
#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "common/trace/otlp_wire.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"

namespace tandem {
namespace {

namespace otlp = opentelemetry::proto::collector::trace::v1;

// As the protocol has it.
bool MayTryAgain(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kResourceExhausted:
      return true;
    default:
      return false;
  }
}

}  // namespace

// The other end. Used by the client's thread.
class OtlpClient::Collector {
 public:
  explicit Collector(const std::string& endpoint)
      : stub_(otlp::TraceService::NewStub(MakeChannel(endpoint, Patience::kPatient))) {}

  // How many of the request's spans were refused.
  absl::StatusOr<int64_t> Export(const otlp::ExportTraceServiceRequest& request,
                                 absl::Duration timeout) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    otlp::ExportTraceServiceResponse response;
    const grpc::Status status = stub_->Export(&context, request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response.partial_success().rejected_spans();
  }

  LogLimiter& failures() { return failures_; }

 private:
  const std::unique_ptr<otlp::TraceService::Stub> stub_;
  LogLimiter failures_{/*burst=*/1, /*per_second=*/1.0 / 60};
};

OtlpClient::OtlpClient(OtlpOptions options, Metrics* metrics)
    : options_(std::move(options)),
      metrics_(metrics),
      collector_(std::make_unique<Collector>(options_.endpoint)),
      thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), "tandem-trace");
}

OtlpClient::~OtlpClient() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void OtlpClient::Add(std::vector<Span> spans) {
  absl::MutexLock lock(&mutex_);
  // A trace with some of its spans would mislead.
  if (waiting_.size() + spans.size() > options_.max_waiting || stopping_) {
    metrics_.no_room.Increment(static_cast<double>(spans.size()));
    return;
  }
  std::move(spans.begin(), spans.end(), std::back_inserter(waiting_));
}

std::vector<Span> OtlpClient::Next() {
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(this, &OtlpClient::HasSpans));
  mutex_.AwaitWithTimeout(absl::Condition(this, &OtlpClient::HasBatch), options_.delay);
  const auto size = static_cast<ptrdiff_t>(std::min(waiting_.size(), options_.batch));
  const auto end = waiting_.begin() + size;
  std::vector<Span> batch(std::make_move_iterator(waiting_.begin()), std::make_move_iterator(end));
  waiting_.erase(waiting_.begin(), end);
  return batch;
}

void OtlpClient::Run() {
  for (std::vector<Span> batch = Next(); !batch.empty(); batch = Next()) {
    if (Send(batch)) continue;
    absl::MutexLock lock(&mutex_);
    if (!stopping_) continue;
    metrics_.not_taken.Increment(static_cast<double>(waiting_.size()));
    return;
  }
}

bool OtlpClient::Send(const std::vector<Span>& batch) {
  const otlp::ExportTraceServiceRequest request = SpansToProto(options_.resource, batch);
  const auto spans = static_cast<double>(batch.size());
  absl::Duration backoff = options_.backoff;
  for (int tries = 1;; ++tries, backoff *= 2) {
    const absl::StatusOr<int64_t> refused = collector_->Export(request, options_.timeout);
    if (refused.ok()) {
      const double lost = std::clamp(static_cast<double>(*refused), 0.0, spans);
      metrics_.exported.Increment(spans - lost);
      metrics_.not_taken.Increment(lost);
      return true;
    }
    bool last = tries >= options_.tries || !MayTryAgain(refused.status());
    if (!last) {
      absl::MutexLock lock(&mutex_);
      // Who ends does not wait for a collector that is away.
      last = mutex_.AwaitWithTimeout(absl::Condition(this, &OtlpClient::Stopping), backoff);
    }
    if (!last) continue;
    metrics_.not_taken.Increment(spans);
    if (collector_->failures().Allow()) {
      spdlog::warn("the collector at {} does not take spans: {}{}", options_.endpoint,
                   MessageOf(refused.status()), collector_->failures().Withheld());
    }
    return false;
  }
}

std::unique_ptr<SpanSink> StartTracing(const TraceOptions& options, const std::string& service,
                                       const std::string& instance, Metrics* metrics) {
  if (options.otlp_endpoint.empty()) return nullptr;
  OtlpOptions otlp;
  otlp.endpoint = options.otlp_endpoint;
  otlp.resource = {{"service.name", service}, {"service.instance.id", instance}};
  return std::make_unique<OtlpClient>(std::move(otlp), metrics);
}

}  // namespace tandem
