#include "common/rpc/trace_metadata.h"

#include <string>

namespace tandem {

TraceContext TraceOf(const grpc::CallbackServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto given = metadata.find(kTraceparentKey);
  if (given == metadata.end()) return {};
  TraceContext trace = ParseTraceparent({given->second.data(), given->second.size()});
  if (!trace.valid()) return trace;
  // Whoever has more to say than one header takes sends several.
  std::string state;
  const auto [first, last] = metadata.equal_range(kTracestateKey);
  for (auto it = first; it != last && state.size() <= kMaxTracestate; ++it) {
    if (!state.empty()) state += ',';
    state.append(it->second.data(), it->second.size());
  }
  trace.state = ParseTracestate(state);
  return trace;
}

void AddTrace(const TraceContext& trace, grpc::ClientContext* context) {
  if (!trace.valid()) return;
  context->AddMetadata(kTraceparentKey, Traceparent(trace));
  if (!trace.state.empty()) context->AddMetadata(kTracestateKey, trace.state);
}

}  // namespace tandem
