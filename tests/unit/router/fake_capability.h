// What a worker of a small model says of itself when it joins.
#pragma once

#include <string>

#include "common/rpc/cluster_client.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem::router {

inline internal::v1::Capability FakeCapability(const std::string& model, uint32_t vocab_size) {
  internal::v1::Capability c;
  c.set_model(model);
  c.set_model_digest("digest");
  c.set_dtype("float32");
  c.set_kv_dtype("float32");
  c.set_num_layers(2);
  c.set_num_kv_heads(1);
  c.set_head_dim(64);
  c.set_block_size(16);
  c.set_layout("HND");
  c.set_tensor_parallel_size(1);
  c.set_protocol_version(kProtocolVersion);
  c.set_vocab_size(vocab_size);
  return c;
}

}  // namespace tandem::router
