// The counts of one end of KV transfers, in the making: each is a metric at the same time, so that
// nothing is counted which nobody can see.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "kvtransfer/channel/kv_counters.h"

namespace prometheus {
class Counter;
}  // namespace prometheus
namespace tandem {
class Metrics;
}  // namespace tandem

namespace tandem::kvtransfer {

// Thread-safe.
class KvCount {
 public:
  void operator++() { Add(1); }
  void operator+=(uint64_t n) { Add(n); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }
  // Before the first count.
  void ExportAs(prometheus::Counter* metric) { metric_ = metric; }

 private:
  void Add(uint64_t n);

  std::atomic<uint64_t> value_{0};
  prometheus::Counter* metric_ = nullptr;
};

// Thread-safe.
struct KvCounterBlock {
  KvCounterBlock() = default;
  // Exports everything as tandem_kv_*_total{end}; `metrics` outlives this, nullptr: exports
  // nothing. `end`: "sender" or "receiver".
  KvCounterBlock(Metrics* metrics, const std::string& end);

  KvCount bytes;
  KvCount transfers;
  std::array<KvCount, kNumKvFailures> failures;
  KvCount late_frames;
  KvCount duplicate_frames;
  KvCount auth_failures;
  KvCount refused_connections;
  KvCount connections_opened;
  KvCount transport_fallbacks;
  KvCount slow_links;
  KvCount fenced_transfers;

  void CountFailure(KvFailure reason) { ++failures[static_cast<size_t>(reason)]; }
  KvTransferCounters Snapshot() const;
};

}  // namespace tandem::kvtransfer
