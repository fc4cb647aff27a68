// Views of imaginary clusters for tests of routing.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "router/registry/cluster_view.h"

namespace tandem::router {

inline WorkerView MakeWorker(const std::string& id, WorkerRole role, LoadReport load = {}) {
  WorkerIdentity identity;
  identity.id = id;
  identity.role = role;
  identity.address = "127.0.0.1:1";
  identity.max_model_len = 1 << 20;
  identity.max_num_seqs = 16;
  identity.num_blocks = 1000;
  identity.local_prefill_max_tokens = role == WorkerRole::kUnified  ? 0xffffffffLL
                                      : role == WorkerRole::kDecode ? 32
                                                                    : 0;
  WorkerView view;
  view.identity = std::make_shared<const WorkerIdentity>(std::move(identity));
  if (load.admits_blocks == 0) load.admits_blocks = load.blocks_free = 1000;
  view.Take(std::move(load));
  view.reported = absl::UnixEpoch() + absl::Hours(24);
  return view;
}

inline ClusterView MakeView(std::vector<WorkerView> workers) {
  ClusterView view;
  view.workers = std::move(workers);
  view.block_size = 16;
  view.kv_bytes_per_token = 57344;
  view.num_layers = 28;
  view.model_digest = "digest";
  return view;
}

inline LoadReport PrefillLoad(double tokens_per_second, int64_t waiting_tokens = 0) {
  LoadReport load;
  load.prefill_tokens_per_second = load.saturated_tokens_per_second = tokens_per_second;
  load.waiting_tokens = waiting_tokens;
  return load;
}

}  // namespace tandem::router
