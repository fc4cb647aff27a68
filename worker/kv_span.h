// The span of a KV transfer, as its receiver saw it.
#pragma once

#include <string>

#include "common/base/trace.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::worker {

// From the first byte to the last, from worker `source` to `destination`. `trace` null, or no byte
// shipped: nothing.
void AddKvTransfer(const kvtransfer::TransferStats& stats, const std::string& source,
                   const std::string& destination, RequestTrace* trace);

}  // namespace tandem::worker
