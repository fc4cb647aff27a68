#include "prefill_worker/prefill_metrics.h"

#include <string>

namespace tandem::prefill {

PrefillMetrics::PrefillMetrics(Metrics* metrics)
    : worker(metrics),
      returned_tokens(metrics->Counter(
          "tandem_kv_returned_tokens_total",
          "Prompt tokens whose KV came back from a decode worker instead of being computed")) {
  for (size_t i = 0; i < by_result.size(); ++i) {
    by_result[i] = &metrics->Counter("tandem_kv_returns_total",
                                     "Times a decode worker was asked to give blocks back, by what "
                                     "became of it",
                                     {{"result", std::string(kReturnResults[i])}});
  }
}

}  // namespace tandem::prefill
