// A worker's side of Cluster/Join with one router: dials it, says hello, reports, reconnects.
// ClusterClients has one for each.
//
// Thread-safe. One stream at a time; a lost stream is dialled again with a backoff of at most 1 s,
// and begins with Hello and a snapshot of the prefix cache (asked for through `on_joined`).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/rpc/cluster_credentials.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem {

struct ClusterClientOptions {
  std::string router_address;  // its internal one
  std::shared_ptr<const ClusterCredentials> credentials;
  internal::v1::Hello hello;
  // Hello goes out now, and the router may count on this worker before its answer is here. On an
  // rpc thread. May be null.
  std::function<void()> on_dial;
  // Joined (again): the worker answers with PostBlocks of a snapshot with cleared = true. On an rpc
  // thread.
  std::function<void()> on_joined;
  // What the router answered to Hello, before on_joined. On an rpc thread. May be null.
  std::function<void(const internal::v1::Welcome&)> on_welcome;
  // The router asks the worker to drain. On an rpc thread.
  std::function<void()> on_drain;
  // Registration refused for good (FAILED_PRECONDITION): the one line that says what differs. The
  // process should exit. Not for who has been a member: then it is the router that was started
  // wrongly, and the worker, who holds what takes long to load, keeps trying and says so.
  std::function<void(const absl::Status&)> on_refused;
};

class ClusterClient {
 public:
  static std::unique_ptr<ClusterClient> Start(ClusterClientOptions options);
  virtual ~ClusterClient() = default;  // leaves the cluster

  virtual bool joined() const = 0;
  // Replaces a report not yet sent. The newest is sent again whenever the cluster is joined again.
  virtual void PostLoad(internal::v1::LoadReport load) = 0;
  // The loop is busy: how long it has not got anywhere. Replaces one not yet sent.
  virtual void PostHeartbeat(absl::Duration without_progress) = 0;
  // In order; merged while the stream is busy. Over a bound the queue is dropped and on_joined
  // called for a snapshot. One that this client has not asked for is another's, and left out.
  virtual void PostBlocks(internal::v1::BlockEvents events) = 0;
  // Tells the router to send no more.
  virtual void PostDraining() = 0;
};

// Grows with every change after which old and new processes must not be one cluster.
inline constexpr uint32_t kProtocolVersion = 3;
// How a block lies in a pool: heads, tokens, head dimension.
inline constexpr char kBlockLayout[] = "HND";

// One line for the worker's own log that says in what it differs from the cluster, "" if they
// agree. Names fields: "block_size: this worker 32, cluster 16"; of digests only that they differ.
// Fields that may differ because KV can be converted (tensor_parallel_size) are not compared.
std::string DescribeDifference(const internal::v1::Capability& cluster,
                               const internal::v1::Capability& worker);
// What cures it, flags and files: "start it with --block-size=16".
std::string DifferenceRemedy(const internal::v1::Capability& cluster,
                             const internal::v1::Capability& worker);
// A digest of the fields that are compared, equal exactly when DescribeDifference is "".
std::string CapabilityDigest(const internal::v1::Capability& capability);
// For Capability::tokenizer_digest: of MODEL_DIR/tokenizer.json's bytes, "" where it cannot be
// read.
std::string TokenizerDigest(const std::string& model_dir);

}  // namespace tandem
