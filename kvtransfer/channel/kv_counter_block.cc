#include "kvtransfer/channel/kv_counter_block.h"

#include "prometheus/counter.h"

#include "common/metrics/metrics.h"

namespace tandem::kvtransfer {

void KvCount::Add(uint64_t n) {
  value_.fetch_add(n, std::memory_order_relaxed);
  if (metric_ != nullptr) metric_->Increment(static_cast<double>(n));
}

KvCounterBlock::KvCounterBlock(Metrics* metrics, const std::string& end) {
  if (metrics == nullptr) return;
  const struct {
    KvCount* count;
    const char* name;
    const char* help;
  } table[] = {
      {&bytes, "tandem_kv_bytes_total", "KV payload sent, or written to the pool"},
      {&transfers, "tandem_kv_transfers_total", "KV transfers sealed"},
      {&late_frames, "tandem_kv_late_frames_total",
       "Frames dropped because their transfer was over, cancelled or unknown"},
      {&duplicate_frames, "tandem_kv_duplicate_frames_total",
       "Frames dropped because their bytes had arrived before"},
      {&auth_failures, "tandem_kv_auth_failures_total",
       "Connections with a wrong token, or with data before any token"},
      {&refused_connections, "tandem_kv_refused_connections_total",
       "Connections refused: another layout, capability or protocol, too many, or a link that "
       "fails its self-test"},
      {&connections_opened, "tandem_kv_connections_total", "Connections between workers made"},
      {&transport_fallbacks, "tandem_kv_transport_fallbacks_total",
       "Connections over another transport than the best that both ends have"},
      {&slow_links, "tandem_kv_slow_links_total",
       "Connections found slower than their transport should be"},
      {&fenced_transfers, "tandem_kv_fenced_transfers_total",
       "Transfers whose blocks had to wait for the end of a writer that lost its connection"},
  };
  for (const auto& row : table) {
    row.count->ExportAs(&metrics->Counter(row.name, row.help, {{"end", end}}));
  }
  for (size_t i = 0; i < kNumKvFailures; ++i) {
    failures[i].ExportAs(&metrics->Counter(
        "tandem_kv_failures_total", "KV transfers that did not end sealed, by reason",
        {{"end", end}, {"reason", std::string(kKvFailureNames[i])}}));
  }
}

KvTransferCounters KvCounterBlock::Snapshot() const {
  KvTransferCounters out;
  out.bytes = bytes.value();
  out.transfers = transfers.value();
  for (size_t i = 0; i < kNumKvFailures; ++i) out.failures[i] = failures[i].value();
  out.late_frames = late_frames.value();
  out.duplicate_frames = duplicate_frames.value();
  out.auth_failures = auth_failures.value();
  out.refused_connections = refused_connections.value();
  out.connections_opened = connections_opened.value();
  out.transport_fallbacks = transport_fallbacks.value();
  out.slow_links = slow_links.value();
  out.fenced_transfers = fenced_transfers.value();
  return out;
}

}  // namespace tandem::kvtransfer
