#include "worker/kv_span.h"

namespace tandem::worker {

void AddKvTransfer(const kvtransfer::TransferStats& stats, const std::string& source,
                   const std::string& destination, RequestTrace* trace) {
  if (trace == nullptr || stats.bytes == 0) return;
  trace->Add("kv_transfer", stats.first_byte, stats.last_byte,
             {{"source", source},
              {"destination", destination},
              {"transport", stats.transport},
              {"kv_bytes", static_cast<int64_t>(stats.bytes)}});
}

}  // namespace tandem::worker
