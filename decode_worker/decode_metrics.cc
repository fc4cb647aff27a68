#include "decode_worker/decode_metrics.h"

namespace tandem::decode {

DecodeMetrics::DecodeMetrics(Metrics* metrics)
    : worker(metrics),
      time_per_output_token(metrics->Histogram(
          "tandem_worker_time_per_output_token_seconds",
          "Mean time between the tokens of a finished request, the first token aside",
          TokenGapBuckets())),
      prefill_retries(
          metrics->Counter("tandem_prefill_retries_total",
                           "Prompts asked of another prefill worker because an attempt failed")),
      kv_recomputes(
          metrics->Counter("tandem_kv_recomputes_total",
                           "Requests recomputed here because their shipped KV never became valid")),
      slow_readers(metrics->Counter("tandem_slow_reader_pauses_total",
                                    "Times a request was paused because its reader was behind")),
      drafted_tokens(metrics->Counter("tandem_drafted_tokens_total",
                                      "Tokens that were guessed and computed ahead (speculation)")),
      accepted_tokens(metrics->Counter("tandem_accepted_tokens_total",
                                       "Of those, the tokens that the model then drew")) {}

}  // namespace tandem::decode
