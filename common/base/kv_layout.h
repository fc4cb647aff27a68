// The shape of a KV pool: the one header that engine and kvtransfer share.
//
// A pool holds `num_blocks` blocks for every layer, layer after layer:
//   [layer][block][K|V][kv_head][block_size][head_dim]
// so each (block, kv_head) page is contiguous ("HND") and a block of one layer is one contiguous
// piece.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/base/dtype.h"

namespace tandem {

// Blocks that `tokens` tokens take.
constexpr int BlocksFor(int tokens, int block_size) {
  return (tokens + block_size - 1) / block_size;
}

struct KvLayout {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_size = 16;  // tokens per block: 16, 32, 64, 128 or 256
  DType dtype = DType::kFloat32;

  // Bytes of one page [block_size][head_dim].
  size_t PageBytes() const {
    return static_cast<size_t>(block_size) * static_cast<size_t>(head_dim) * DTypeSize(dtype);
  }
  // Bytes of one block of one layer: K and V pages of all heads.
  size_t BlockLayerBytes() const { return 2 * static_cast<size_t>(num_kv_heads) * PageBytes(); }
  // Bytes of one block over all layers.
  size_t BlockBytes() const { return static_cast<size_t>(num_layers) * BlockLayerBytes(); }
  int BlocksFor(int tokens) const { return tandem::BlocksFor(tokens, block_size); }
  size_t BytesPerToken() const { return BlockBytes() / static_cast<size_t>(block_size); }

  bool operator==(const KvLayout&) const = default;
};

// Where the bytes of a pool lie, which says who can copy and digest them.
enum class KvMemoryKind {
  kHost,    // the CPU can read and write them
  kDevice,  // only copies and kernels of a device can
};

// A pool's memory as kvtransfer sees it. Not owning; valid as long as the pool.
struct KvRegion {
  std::byte* base = nullptr;
  KvLayout layout;
  int num_blocks = 0;
  KvMemoryKind memory = KvMemoryKind::kHost;
  // Descriptor of the shared memory that `base` maps from its beginning, so that a process of the
  // same host can map it too; -1 where the pool is memory of this process alone.
  int fd = -1;
  // Number, among all KV heads of the model, of head 0 of this pool: not 0 only where tensor
  // parallelism splits the heads over several pools.
  int first_kv_head = 0;

  size_t TotalBytes() const { return layout.BlockBytes() * static_cast<size_t>(num_blocks); }
  // First byte of `block` in `layer`; layout.BlockLayerBytes() bytes belong to it.
  std::byte* Block(int layer, int block) const {
    const size_t index =
        static_cast<size_t>(layer) * static_cast<size_t>(num_blocks) + static_cast<size_t>(block);
    return base + index * layout.BlockLayerBytes();
  }
};

}  // namespace tandem
