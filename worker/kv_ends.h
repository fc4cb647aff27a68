// The KV endpoints of a worker process, as its flags and its engine have them.
#pragma once

#include "absl/status/statusor.h"

#include "common/base/host_port.h"
#include "common/rpc/worker_process.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "worker/worker.h"

namespace tandem::worker {

// Where to listen for KV blocks. INVALID_ARGUMENT where others, who are told this worker's host,
// would not reach it there.
absl::StatusOr<HostPort> KvListenAddress(const WorkerProcessOptions& process);

// All but the callbacks. INVALID_ARGUMENT as KvListenAddress, or without a secret that it needs.
absl::StatusOr<kvtransfer::KvReceiverOptions> MakeReceiverOptions(const Frame& frame);
kvtransfer::KvSenderOptions MakeSenderOptions(const Frame& frame);

}  // namespace tandem::worker
