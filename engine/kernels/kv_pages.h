// Keys and values of one layer, in pages.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/element.h"

namespace tandem::engine {

// One layer of a pool: [block][K|V][kv_head][block_size][head_dim], see common/base/kv_layout.h.
struct KvPages {
  std::byte* base = nullptr;
  Element element = Element::kFloat32;  // kFloat32, kBFloat16 or kFloat8E4M3
  int kv_heads = 0;
  int head_dim = 0;
  int block_size = 16;  // positions, a multiple of 16
  int num_blocks = 0;   // of the pool; for devices whose copy engines check bounds

  size_t PageBytes() const {
    return static_cast<size_t>(block_size) * static_cast<size_t>(head_dim) * ElementSize(element);
  }
  // First element of the page of (block, K or V, kv_head): [block_size][head_dim].
  std::byte* Page(int32_t block, bool value, int kv_head) const {
    const size_t index =
        (static_cast<size_t>(block) * 2 + (value ? 1 : 0)) * static_cast<size_t>(kv_heads) +
        static_cast<size_t>(kv_head);
    return base + index * PageBytes();
  }
};

}  // namespace tandem::engine
