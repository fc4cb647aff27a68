// What the router knows of its workers at one moment: plain values, immutable once published.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "common/base/load_report.h"

namespace tandem::router {

enum class WorkerRole { kPrefill, kDecode, kUnified };

constexpr std::string_view WorkerRoleName(WorkerRole role) {
  switch (role) {
    case WorkerRole::kPrefill:
      return "prefill";
    case WorkerRole::kDecode:
      return "decode";
    case WorkerRole::kUnified:
      return "unified";
  }
  return "?";
}

// What a worker said of itself when it joined.
struct WorkerIdentity {
  std::string id;
  uint64_t incarnation = 0;  // random per process
  WorkerRole role = WorkerRole::kPrefill;
  std::string address;          // HOST:PORT of its RPC service
  std::string metrics_address;  // HOST:PORT
  std::string kv_address;       // HOST:PORT where it takes KV blocks; empty: it takes none
  std::string vouch_key;        // of prefill workers: common/auth/voucher.h
  int max_model_len = 0;        // tokens
  int max_num_seqs = 0;
  int num_blocks = 0;
  int64_t local_prefill_max_tokens = 0;  // uncached tokens it will compute itself
  absl::Time joined;
  uint32_t slot = 0;  // its number in the PrefixIndex
};

struct WorkerView {
  std::shared_ptr<const WorkerIdentity> identity;
  std::shared_ptr<const LoadReport> load;        // the last one; never null
  absl::Time reported;                           // when `load` came; InfinitePast: not yet
  absl::Time progressed = absl::InfinitePast();  // last known to get anywhere
  bool draining = false;
  double fastest_link = 0;  // bytes/s, of those in `load`; 0: none is known

  void Take(LoadReport report) {
    fastest_link = 0;
    for (const auto& [peer, link] : report.links) {
      fastest_link = std::max(fastest_link, link.bytes_per_second);
    }
    load = std::make_shared<const LoadReport>(std::move(report));
  }

  // For how long it has not got anywhere, as far as it has spoken at all.
  absl::Duration Stalled(absl::Time now) const {
    return reported == absl::InfinitePast() ? absl::ZeroDuration() : now - progressed;
  }
  // As operators read it. One that gets nowhere for `stalled_after` gets no request.
  std::string_view State(absl::Time now, absl::Duration stalled_after) const {
    if (draining) return "draining";
    return Stalled(now) >= stalled_after ? "stalled" : "ready";
  }
  bool prefills() const { return identity->role == WorkerRole::kPrefill; }
};

struct ClusterView {
  std::vector<WorkerView> workers;  // ascending id
  // Of the capability that all workers share; block_size 0 while none has joined.
  int block_size = 0;
  int64_t kv_bytes_per_token = 0;
  int num_layers = 0;
  std::string model_digest;
  std::string dtype;
  std::string capability;  // one line
  // What some decode worker holds, so that none lowers it for others; 0: none has joined.
  int max_model_len = 0;

  // In `workers`; -1: none of that id is there.
  int PlaceOf(std::string_view worker_id) const {
    const auto it = std::lower_bound(
        workers.begin(), workers.end(), worker_id,
        [](const WorkerView& worker, std::string_view id) { return worker.identity->id < id; });
    if (it == workers.end() || it->identity->id != worker_id) return -1;
    return static_cast<int>(it - workers.begin());
  }
  // The worker of that id, or null.
  const WorkerView* Find(std::string_view worker_id) const {
    const int place = PlaceOf(worker_id);
    return place < 0 ? nullptr : &workers[static_cast<size_t>(place)];
  }
  // Whether some request could be served: a unified worker, or a decode and a prefill worker, none
  // of them draining.
  bool Serving() const {
    bool prefill = false, decode = false;
    for (const WorkerView& worker : workers) {
      if (worker.draining) continue;
      if (worker.identity->role == WorkerRole::kUnified) return true;
      (worker.prefills() ? prefill : decode) = true;
    }
    return prefill && decode;
  }
};

}  // namespace tandem::router
