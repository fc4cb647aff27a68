// Spans -> messages of OpenTelemetry. Pure functions.
#pragma once

#include <span>

#include "common/base/trace.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.pb.h"

namespace tandem {

// One process's spans; `resource` says which process (service.name, ...).
opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest SpansToProto(
    const LogFields& resource, std::span<const Span> spans);

}  // namespace tandem
