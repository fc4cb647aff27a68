#include "engine/wire/cluster_wire.h"

#include "common/base/block_hash.h"
#include "common/base/dtype.h"
#include "common/rpc/cluster_client.h"

namespace tandem::engine {

internal::v1::Capability CapabilityOf(const Engine& engine, const std::string& served_model_name) {
  const KvLayout layout = engine.region().layout;
  internal::v1::Capability out;
  out.set_model(served_model_name);
  out.set_model_digest(engine.model_digest());
  out.set_dtype(engine.options().dtype);
  out.set_kv_dtype(std::string(DTypeName(layout.dtype)));
  // What a checkpoint brings is in its digest.
  if (engine.options().quantization == "fp8") out.set_quantization("fp8");
  out.set_num_layers(static_cast<uint32_t>(layout.num_layers));
  out.set_num_kv_heads(static_cast<uint32_t>(layout.num_kv_heads));
  out.set_head_dim(static_cast<uint32_t>(layout.head_dim));
  out.set_block_size(static_cast<uint32_t>(layout.block_size));
  out.set_layout(kBlockLayout);
  out.set_tensor_parallel_size(static_cast<uint32_t>(engine.options().tensor_parallel_size));
  out.set_tokenizer_digest(TokenizerDigest(engine.options().model_dir));
  out.set_protocol_version(kProtocolVersion);
  out.set_vocab_size(static_cast<uint32_t>(engine.config().vocab_size));
  return out;
}

internal::v1::BlockEvents BlockEventsToProto(const BlockEvents& events, bool cleared) {
  internal::v1::BlockEvents out;
  for (const Hash128& hash : events.stored) out.add_stored(hash.ToBytes());
  for (const Hash128& hash : events.removed) out.add_removed(hash.ToBytes());
  out.set_cleared(cleared);
  return out;
}

}  // namespace tandem::engine
