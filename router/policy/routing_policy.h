// Where a request goes: the seam between the router and its policies.
//
// Policies are pure: no clock, no state, no I/O. Everything that a choice depends on is an
// argument.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "router/registry/cluster_view.h"

namespace tandem::router {

// What a worker's last load report cannot contain yet: requests routed there since, less those that
// have ended since (so a sum may be negative).
struct RoutedWork {
  int sequences = 0;           // sequences routed
  int64_t blocks = 0;          // decode: KV blocks they take
  int64_t prefill_tokens = 0;  // uncached prompt tokens routed for prefill
  uint64_t total = 0;          // requests ever routed here; spreads equal costs
};

// Why a worker is no candidate for one request.
enum class Exclusion : uint8_t {
  kNone,
  kLost,     // failed this request
  kFull,     // refused it for want of room, and has not reported since
  kSuspect,  // a prefill worker that failed lately: only where there is no better one
};

// Spans have one entry per worker of the view, in its order.
struct RouteQuery {
  int prompt_tokens = 0;
  std::span<const int> cached_tokens;  // leading prompt tokens that the worker's cache may hold
  std::span<const RoutedWork> routed;
  std::span<const Exclusion> excluded;
};

// Where one request goes, and why.
struct Route {
  struct Worker {
    std::string id;
    uint64_t incarnation = 0;  // of its process
    std::string address;       // HOST:PORT
    std::string kv_address;    // of a decode worker, for which its prefill workers need
    std::string vouch_key;     // a word of the router's under this key (common/auth/voucher.h)
    // Of a prefill worker: where the decode worker gives it blocks back; empty: it computes them.
    std::string return_address;
  };
  Worker decode;
  absl::Time reported;          // when the decode worker had last reported
  std::vector<Worker> prefill;  // best first; empty: the decode worker prefills itself
  double cost_ms = 0;
  double wait_ms = 0;               // until the worker that prefills begins with it
  int predicted_cached_tokens = 0;  // on the worker that will prefill, or given back to it
  int uncached_tokens = 0;          // what that worker will compute
  std::string reason;               // one line for logs
  int may_lose = 2;                 // workers that may be lost with the request; at least 1
};

class RoutingPolicy {
 public:
  virtual ~RoutingPolicy() = default;
  // UNAVAILABLE: no worker that could take it has joined. RESOURCE_EXHAUSTED: those there are full;
  // with a Refusal of kPrefill where what room they have is promised to prompts that wait for
  // prefill workers, and is there for what decode workers prefill themselves.
  virtual absl::StatusOr<Route> Choose(const ClusterView& view, const RouteQuery& query) const = 0;
};

}  // namespace tandem::router
