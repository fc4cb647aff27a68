// A worker's side of the cluster: a member with every router, each of which has a stream, an index
// of the worker's blocks and a picture of its load of its own. A request may come through any.
//
// Routers are the hosts that their names stand for now (common/base/resolve.h), so that one name
// does for all that are there, come and go. An address that its name no longer has is given up
// once the stream to it ends: a router that drains, or is not ready, is none that is lost.
//
// Thread-safe.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/auth/voucher.h"
#include "common/base/host_port.h"
#include "common/base/resolve.h"
#include "common/rpc/cluster_client.h"

namespace tandem {

struct ClusterClientsOptions {
  std::vector<HostPort> routers;  // their internal addresses
  std::shared_ptr<const ClusterCredentials> credentials;
  internal::v1::Hello hello;
  // Told what routers vouch with; may be null. Outlives the clients.
  VoucherCheck* vouchers = nullptr;
  // See ClusterClientOptions. Any router's, on an rpc thread.
  std::function<void()> on_joined;
  std::function<void()> on_drain;
  // Every router that there is has refused this worker, and none has ever taken it in: as of one
  // router, the process should exit. While another may still take it, whoever refuses it is dialled
  // again.
  std::function<void(const absl::Status&)> on_refused;
  // How many routers there are, one for a name without an address, and how many of them this worker
  // has joined: told now and then, on an rpc thread. May be null.
  std::function<void(size_t routers, size_t joined)> on_look;
  // The hosts of a name. One call at a time, on a thread of its own, which may outlive the clients.
  Resolver::Ask resolve = ResolveHosts;
  // Between two looks at who there is, and while a router is missing.
  absl::Duration calm = absl::Seconds(5);
  absl::Duration eager = absl::Seconds(1);
};

class ClusterClients {
 public:
  explicit ClusterClients(ClusterClientsOptions options);
  // Leaves every router. Does not wait for a name service.
  ~ClusterClients();

  // As of one ClusterClient, to each.
  void PostLoad(const internal::v1::LoadReport& load);
  void PostHeartbeat(absl::Duration without_progress);
  void PostBlocks(const internal::v1::BlockEvents& events);
  void PostDraining();

 private:
  struct Router {
    std::unique_ptr<ClusterClient> client;
    absl::Status refusal;      // OK: `client` is dialling, or a member
    std::string said_refusal;  // as last logged
  };

  void Run();
  // Resolves the names and brings routers_ up to date. Only thread_.
  void Look();
  std::vector<std::string> Addresses();
  std::unique_ptr<ClusterClient> Dial(const std::string& address)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnWelcome(const std::string& address, const internal::v1::Welcome& welcome);
  void OnRefused(const std::string& address, const absl::Status& status);

  const ClusterClientsOptions options_;
  Resolver resolver_;
  std::map<std::string, std::vector<std::string>> resolved_;  // by name, the last time; thread_'s
  absl::Time last_warning_ = absl::InfinitePast();            // thread_'s
  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool member_ ABSL_GUARDED_BY(mutex_) = false;                    // of any, at any time
  std::map<std::string, Router> routers_ ABSL_GUARDED_BY(mutex_);  // by address
  // For those that are found later.
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  internal::v1::LoadReport load_ ABSL_GUARDED_BY(mutex_);
  bool has_load_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: runs over all of the above
};

}  // namespace tandem
