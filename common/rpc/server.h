// One gRPC server with what every Tandem process offers: its services, grpc.health.v1 and
// reflection of all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

#include "common/rpc/cluster_credentials.h"

namespace tandem {

struct RpcServerOptions {
  std::string listen_address = "127.0.0.1:0";
  // Given: an internal server, which is reached only by parties of the cluster that have one of the
  // roles `callers`, and whose calls know the caller (CallerOf). Null: open to anyone.
  std::shared_ptr<const ClusterCredentials> credentials;
  std::vector<std::string> callers;
  int max_receive_bytes = 64 << 20;
  // Calls at once on one connection; a client's further ones wait in it.
  int max_streams_per_connection = 1024;
  // What all connections together may hold of messages and buffers; beyond it gRPC reads less, then
  // ends calls with RESOURCE_EXHAUSTED.
  int64_t memory_bytes = int64_t{1} << 30;
};

// Thread-safe.
class RpcServer {
 public:
  // Error names the address ("port in use"). `services` outlive the server.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(
      const RpcServerOptions& options, const std::vector<grpc::Service*>& services);
  virtual ~RpcServer() = default;

  virtual int port() const = 0;
  virtual const std::string& address() const = 0;  // host as given, port as bound
  // Health of "" and of every service; NOT_SERVING until the first call with true. Watchers are
  // told.
  virtual void SetServing(bool serving) = 0;
  // Refuses new calls, lets running ones end up to `grace`, then cancels them.
  virtual void Shutdown(absl::Duration grace) = 0;
};

enum class Patience {
  kEager,    // a silent peer fails the running calls within about 2 s; for callback-API calls only
  kPatient,  // within 30 s; for blocking calls, whose caller may pause between two reads
};

// A channel to a public server with Tandem's arguments: keepalive pings while calls are running, no
// message size surprise, no proxy, own subchannel pool. Reconnects by itself with a backoff of at
// most 1 s.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           Patience patience = Patience::kEager);
// The same to an internal server. A call fails with UNAVAILABLE, before anything of it is sent,
// unless who answers proves to be `callee` (id empty: any party of that role).
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           const ClusterCredentials& credentials,
                                           const Party& callee,
                                           Patience patience = Patience::kEager);

// Whether a connection to the server stood when the call ended without OK: false means that it
// never had the call.
bool Reached(const grpc::ClientContext& context);

// Blocks SIGINT and SIGTERM for the calling thread and all threads started later, and ignores
// SIGPIPE; Wait() returns the signal that came. Create in main() first, one per process.
class SignalWaiter {
 public:
  SignalWaiter();
  ~SignalWaiter();
  SignalWaiter(const SignalWaiter&) = delete;
  SignalWaiter& operator=(const SignalWaiter&) = delete;

  // One thread at a time.
  int Wait();
  // From any thread: makes Wait() return 0 (drained by command).
  void Wake();

 private:
  int signal_fd_ = -1;
  int wake_fd_ = -1;
};

}  // namespace tandem
