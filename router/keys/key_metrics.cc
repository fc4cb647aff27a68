#include "router/keys/key_metrics.h"

namespace tandem::router {
namespace {

prometheus::Counter& Refused(Metrics* metrics, const std::string& name, const char* reason) {
  return metrics->Counter("tandem_api_key_refused_total",
                          "Calls refused though their API key is known, by what they were over.",
                          {{"key", name}, {"reason", reason}});
}

}  // namespace

KeyMetrics::KeyMetrics(Metrics* metrics, const std::string& name)
    : requests(metrics->Counter("tandem_api_key_requests_total",
                                "Calls let in, by the name of their API key.", {{"key", name}})),
      tokens(metrics->Counter("tandem_api_key_tokens_total",
                              "Tokens of prompts and answers, by the name of the API key.",
                              {{"key", name}})),
      refused_requests(Refused(metrics, name, "requests")),
      refused_tokens(Refused(metrics, name, "tokens")),
      refused_priority(Refused(metrics, name, "priority")) {}

prometheus::Gauge& KeysFileBroken(Metrics* metrics) {
  return metrics->Gauge("tandem_api_keys_file_broken",
                        "1: the file of API keys cannot be used, and older keys are in force");
}

}  // namespace tandem::router
