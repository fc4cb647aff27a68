// What the prefill worker measures beyond what both kinds of worker do.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "common/metrics/metrics.h"
#include "common/metrics/worker_metrics.h"

namespace tandem::prefill {

// What became of blocks that a decode worker was asked to give back.
enum class ReturnResult {
  kSealed,     // they are here
  kDamaged,    // bytes or frames were lost on the way
  kLost,       // the link, the sender or its blocks are gone
  kLate,       // nothing came for too long
  kCancelled,  // nobody wants the prompt any more
};

// By the enumerator's value; labels of tandem_kv_returns_total{result}.
inline constexpr std::array<std::string_view, 5> kReturnResults = {"sealed", "damaged", "lost",
                                                                   "late", "cancelled"};

// Thread-safe; children are resolved once, here.
struct PrefillMetrics {
  // `metrics` outlives this.
  explicit PrefillMetrics(Metrics* metrics);

  prometheus::Counter& returns(ReturnResult result) {
    return *by_result[static_cast<size_t>(result)];
  }

  WorkerMetrics worker;
  std::array<prometheus::Counter*, kReturnResults.size()> by_result;
  prometheus::Counter& returned_tokens;  // tandem_kv_returned_tokens_total
};

}  // namespace tandem::prefill
