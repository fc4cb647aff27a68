#include "common/trace/otlp_wire.h"

#include <string>
#include <variant>

namespace tandem {
namespace {

namespace otel = opentelemetry::proto;
using Attributes = google::protobuf::RepeatedPtrField<otel::common::v1::KeyValue>;

void FieldsToProto(const LogFields& fields, Attributes* out) {
  for (const auto& [name, value] : fields) {
    otel::common::v1::KeyValue* attribute = out->Add();
    attribute->set_key(name);
    otel::common::v1::AnyValue& to = *attribute->mutable_value();
    if (const auto* text = std::get_if<std::string>(&value)) {
      to.set_string_value(*text);
    } else if (const auto* count = std::get_if<int64_t>(&value)) {
      to.set_int_value(*count);
    } else {
      to.set_double_value(std::get<double>(value));
    }
  }
}

std::string SpanIdToBytes(uint64_t id) {
  std::string bytes(sizeof(id), '\0');
  for (size_t i = 0; i < sizeof(id); ++i) {
    bytes[i] = static_cast<char>(id >> (8 * (sizeof(id) - 1 - i)));
  }
  return bytes;
}

otel::trace::v1::Span::SpanKind KindToProto(SpanKind kind) {
  switch (kind) {
    case SpanKind::kServer:
      return otel::trace::v1::Span::SPAN_KIND_SERVER;
    case SpanKind::kClient:
      return otel::trace::v1::Span::SPAN_KIND_CLIENT;
    case SpanKind::kInternal:
      break;
  }
  return otel::trace::v1::Span::SPAN_KIND_INTERNAL;
}

uint64_t Nanos(absl::Time time) { return static_cast<uint64_t>(absl::ToUnixNanos(time)); }

void SpanToProto(const Span& span, otel::trace::v1::Span* out) {
  out->set_trace_id(span.context.trace.ToBytes());
  out->set_span_id(SpanIdToBytes(span.context.span));
  out->set_trace_state(span.context.state);
  if (span.parent != 0) out->set_parent_span_id(SpanIdToBytes(span.parent));
  out->set_name(span.name);
  out->set_kind(KindToProto(span.kind));
  out->set_start_time_unix_nano(Nanos(span.start));
  out->set_end_time_unix_nano(Nanos(span.end));
  FieldsToProto(span.attributes, out->mutable_attributes());
  if (span.code == absl::StatusCode::kOk) return;
  out->mutable_status()->set_code(otel::trace::v1::Status::STATUS_CODE_ERROR);
  // The code alone: what a status says may quote the client.
  out->mutable_status()->set_message(absl::StatusCodeToString(span.code));
}

}  // namespace

otel::collector::trace::v1::ExportTraceServiceRequest SpansToProto(const LogFields& resource,
                                                                   std::span<const Span> spans) {
  otel::collector::trace::v1::ExportTraceServiceRequest request;
  otel::trace::v1::ResourceSpans* of_process = request.add_resource_spans();
  FieldsToProto(resource, of_process->mutable_resource()->mutable_attributes());
  otel::trace::v1::ScopeSpans* scope = of_process->add_scope_spans();
  scope->mutable_scope()->set_name("tandem");
  for (const Span& span : spans) SpanToProto(span, scope->add_spans());
  return request;
}

}  // namespace tandem
