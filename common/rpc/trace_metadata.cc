#include "common/rpc/trace_metadata.h"

namespace tandem {

TraceContext TraceOf(const grpc::CallbackServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto given = metadata.find(kTraceparentKey);
  if (given == metadata.end()) return {};
  return ParseTraceparent({given->second.data(), given->second.size()});
}

void AddTrace(const TraceContext& trace, grpc::ClientContext* context) {
  if (trace.valid()) context->AddMetadata(kTraceparentKey, Traceparent(trace));
}

}  // namespace tandem
