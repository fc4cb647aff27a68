// Contexts of traces on their way with a call, as metadata. Pure functions.
#pragma once

#include "grpcpp/grpcpp.h"

#include "common/base/trace.h"

namespace tandem {

// What the caller says; no trace where it says none.
TraceContext TraceOf(const grpc::CallbackServerContext& context);
// Tells the callee, before the call begins; nothing where there is no trace.
void AddTrace(const TraceContext& trace, grpc::ClientContext* context);

}  // namespace tandem
