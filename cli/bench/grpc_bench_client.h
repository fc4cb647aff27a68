// BenchClient over tandem.v1.Inference: a thread per connection, none per stream.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"

#include "cli/bench/bench_client.h"
#include "common/rpc/public_server.h"
#include "tandem/v1/inference.grpc.pb.h"

namespace tandem::cli {

struct GrpcBenchClientOptions {
  PublicServer server;
  std::string model;  // served name; empty: the cluster's model
  // Streams go over these in turn: what one connection writes and reads passes one lock.
  int connections = 4;
  v1::SamplingParams sampling;  // max_tokens is each request's own
};

class GrpcBenchClient : public BenchClient {
 public:
  explicit GrpcBenchClient(GrpcBenchClientOptions options);
  // Cancels what runs and waits for its end.
  ~GrpcBenchClient() override;

  absl::StatusOr<BenchModel> Describe() override;
  void Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) override;
  void CancelAll() override;

 private:
  class Call;
  struct Connection;

  void Ended(Call* call);
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_.empty(); }

  const GrpcBenchClientOptions options_;
  absl::Mutex mutex_;
  size_t next_connection_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_set<Call*> running_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Connection>> connections_;  // last: their threads use the rest
};

}  // namespace tandem::cli
