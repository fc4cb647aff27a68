#include "tests/support/otlp_collector.h"

#include <algorithm>
#include <chrono>
#include <string_view>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "fmt/format.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

namespace otlp = opentelemetry::proto;
using Attributes = google::protobuf::RepeatedPtrField<otlp::common::v1::KeyValue>;

std::map<std::string, std::string> TextOf(const Attributes& attributes) {
  std::map<std::string, std::string> out;
  for (const auto& attribute : attributes) {
    const otlp::common::v1::AnyValue& value = attribute.value();
    out[attribute.key()] = value.has_string_value() ? value.string_value()
                           : value.has_int_value()  ? std::to_string(value.int_value())
                                                    : std::to_string(value.double_value());
  }
  return out;
}

CollectedSpan SpanOf(const otlp::trace::v1::Span& span) {
  CollectedSpan out;
  out.name = span.name();
  out.trace = absl::BytesToHexString(span.trace_id());
  out.id = absl::BytesToHexString(span.span_id());
  out.state = span.trace_state();
  out.parent = absl::BytesToHexString(span.parent_span_id());
  out.kind = span.kind();
  out.start = static_cast<double>(span.start_time_unix_nano()) * 1e-9;
  out.end = static_cast<double>(span.end_time_unix_nano()) * 1e-9;
  out.error = span.status().code() == otlp::trace::v1::Status::STATUS_CODE_ERROR;
  out.attributes = TextOf(span.attributes());
  return out;
}

}  // namespace

std::string ToText(const std::vector<CollectedSpan>& spans) {
  std::string out;
  const double first = spans.empty() ? 0 : spans.front().start;
  for (const CollectedSpan& span : spans) {
    out += fmt::format("{} {} <- {} {} of {} [{:.3f}, {:.3f}] ms{}", span.trace, span.id,
                       span.parent, span.name, span.instance, (span.start - first) * 1e3,
                       (span.end - first) * 1e3, span.error ? " ERROR" : "");
    for (const auto& [name, value] : span.attributes) out += fmt::format(" {}={}", name, value);
    out += "\n";
  }
  return out;
}

std::unique_ptr<OtlpCollector> OtlpCollector::Start(const std::string& address) {
  auto collector = std::make_unique<OtlpCollector>();
  auto server = RpcServer::Start({.listen_address = address}, {collector.get()});
  if (!server.ok()) {
    ADD_FAILURE() << server.status();
    return nullptr;
  }
  collector->server_ = *std::move(server);
  return collector;
}

OtlpCollector::~OtlpCollector() {
  if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
}

void OtlpCollector::Answer(grpc::Status status) {
  absl::MutexLock lock(&mutex_);
  answer_ = std::move(status);
}

int OtlpCollector::calls() const {
  absl::MutexLock lock(&mutex_);
  return calls_;
}

size_t OtlpCollector::largest() const {
  absl::MutexLock lock(&mutex_);
  return largest_;
}

std::vector<CollectedSpan> OtlpCollector::spans(const std::string& trace) const {
  std::vector<CollectedSpan> out;
  {
    absl::MutexLock lock(&mutex_);
    std::copy_if(spans_.begin(), spans_.end(), std::back_inserter(out),
                 [&](const CollectedSpan& span) { return trace.empty() || span.trace == trace; });
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const auto& a, const auto& b) { return a.start < b.start; });
  return out;
}

bool OtlpCollector::WaitFor(const std::string& trace,
                            const std::function<bool(const std::vector<CollectedSpan>&)>& condition,
                            double seconds) const {
  for (int i = 0; i < static_cast<int>(seconds * 100) + 1; ++i) {
    if (condition(spans(trace))) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

grpc::ServerUnaryReactor* OtlpCollector::Export(grpc::CallbackServerContext* context,
                                                const Request* request, Response* /*response*/) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::MutexLock lock(&mutex_);
  ++calls_;
  size_t spans = 0;
  for (const auto& of_process : request->resource_spans()) {
    const auto resource = TextOf(of_process.resource().attributes());
    for (const auto& scope : of_process.scope_spans()) {
      spans += static_cast<size_t>(scope.spans_size());
      for (const auto& span : scope.spans()) {
        if (!answer_.ok()) continue;
        CollectedSpan& collected = spans_.emplace_back(SpanOf(span));
        collected.service = resource.at("service.name");
        collected.instance = resource.at("service.instance.id");
      }
    }
  }
  largest_ = std::max(largest_, spans);
  reactor->Finish(answer_);
  return reactor;
}

}  // namespace tandem
