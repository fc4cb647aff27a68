#include "decode_worker/decode_wire.h"

namespace tandem::decode {

internal::v1::LoadReport LoadToProto(const LoadSnapshot& load) {
  internal::v1::LoadReport out;
  out.set_running(static_cast<uint32_t>(load.running));
  out.set_waiting(static_cast<uint32_t>(load.waiting));
  out.set_waiting_tokens(static_cast<uint64_t>(load.waiting_tokens));
  out.set_blocks_free(static_cast<uint32_t>(load.blocks.free));
  out.set_blocks_cached(static_cast<uint32_t>(load.blocks.cached));
  out.set_blocks_used(static_cast<uint32_t>(load.blocks.used));
  out.set_blocks_quarantined(static_cast<uint32_t>(load.blocks.quarantined));
  out.set_prefill_tokens_per_second(load.prefill_tokens_per_second);
  out.set_decode_step_milliseconds(load.decode_step_milliseconds);
  return out;
}

}  // namespace tandem::decode
