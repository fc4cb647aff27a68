#include "engine/runtime/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/base/status.h"
#include "common/config/bytes.h"

namespace tandem::engine {
namespace {

// What an idle card's driver, its desktop and this process's own context stay below.
constexpr size_t kQuietUse = size_t{2} << 30;
// More is not advised: the driver takes memory of its own as it goes.
constexpr double kHighestUtilization = 0.98;

double ShareOf(const DeviceMemory& m, size_t bytes) {
  return static_cast<double>(bytes) / static_cast<double>(m.total);
}

size_t FreeOf(const DeviceMemory& m) { return m.total - std::min(m.total, m.used_before); }

std::string Figures(const DeviceMemory& m) {
  return fmt::format("of the card's {}, {} were in use before, weights take {} and workspaces {}",
                     FormatBytes(m.total), FormatBytes(m.used_before), FormatBytes(m.weights),
                     FormatBytes(m.workspace));
}

// Of the pool's flag, which speaks of all ranks.
size_t OfAllRanks(const DeviceMemory& m, size_t pool) {
  return pool * static_cast<size_t>(m.ranks);
}

// What would make room for a pool of `pool_wanted` bytes.
std::string Remedy(const DeviceMemory& m, size_t pool_wanted) {
  const size_t wanted = m.weights + m.workspace + pool_wanted;
  if (m.pool != 0 && wanted <= FreeOf(m)) {
    return fmt::format("give --kv-cache-memory-bytes={}", OfAllRanks(m, pool_wanted));
  }
  const double share = std::ceil(ShareOf(m, wanted) * 100) / 100;
  const double free = m.used_before > kQuietUse ? ShareOf(m, FreeOf(m)) : 1;
  if (m.pool == 0 && share <= std::min(kHighestUtilization, free)) {
    return fmt::format("give --gpu-memory-utilization={:.2f}", share);
  }
  if (m.used_before > kQuietUse) {
    return "end the other processes on the card (nvidia-smi shows them)";
  }
  if (ShareOf(m, m.weights) > kHighestUtilization) return "the model is too large for the card";
  return "lower --max-num-batched-tokens or --max-num-seqs, whose workspaces take room";
}

}  // namespace

absl::StatusOr<PoolPlan> PlanPool(const KvLayout& layout, size_t bytes, int max_model_len,
                                  int limit, const std::string& remedy) {
  if (max_model_len > limit) {
    return InvalidArgument(
        "--max-model-len={} exceeds what the model's positions allow; the "
        "largest is {}",
        max_model_len, limit);
  }
  const size_t block_bytes = layout.BlockBytes();
  const size_t block_size = static_cast<size_t>(layout.block_size);
  const size_t blocks = std::min<size_t>(bytes / block_bytes, std::numeric_limits<int32_t>::max());
  if (blocks == 0) {
    return InvalidArgument(
        "a KV pool of {} bytes (--kv-cache-memory-bytes) does not hold a single block of {} "
        "tokens, which takes {} bytes",
        bytes, layout.block_size, block_bytes);
  }
  const size_t fits = std::min(blocks * block_size, static_cast<size_t>(limit));
  if (static_cast<size_t>(max_model_len) > fits) {
    return InvalidArgument(
        "--max-model-len={} does not fit the KV pool of {} ({} blocks of {} tokens, {} a token); "
        "the largest that would fit is {}, or {}",
        max_model_len, FormatBytes(blocks * block_bytes), blocks, block_size,
        FormatBytes(layout.BytesPerToken()), fits, remedy);
  }
  return PoolPlan{static_cast<int>(blocks),
                  max_model_len > 0 ? max_model_len : static_cast<int>(fits)};
}

absl::StatusOr<PoolPlan> PlanDevicePool(const KvLayout& layout, const DeviceMemory& memory,
                                        int max_model_len, int limit) {
  const size_t model = memory.weights + memory.workspace, free = FreeOf(memory);
  const size_t least = layout.BlockBytes() *
                       static_cast<size_t>(layout.BlocksFor(std::clamp(max_model_len, 1, limit)));
  if (memory.pool != 0) {
    if (model + memory.pool > free) {
      return ResourceExhausted("--kv-cache-memory-bytes={} ({}) does not fit: {}, which leaves {}",
                               OfAllRanks(memory, memory.pool),
                               FormatBytes(OfAllRanks(memory, memory.pool)), Figures(memory),
                               FormatBytes(OfAllRanks(memory, free - std::min(free, model))));
    }
    return PlanPool(layout, memory.pool, max_model_len, limit, Remedy(memory, least));
  }
  size_t budget = static_cast<size_t>(memory.utilization * static_cast<double>(memory.total));
  if (budget > free && memory.used_before > kQuietUse) {
    return ResourceExhausted(
        "other processes use {} of the card's {}: {} are free, and --gpu-memory-utilization={:.2f} "
        "wants {}. End them (nvidia-smi shows them), or give --gpu-memory-utilization={:.2f}",
        FormatBytes(memory.used_before), FormatBytes(memory.total), FormatBytes(free),
        memory.utilization, FormatBytes(budget), std::floor(ShareOf(memory, free) * 100) / 100);
  }
  budget = std::min(budget, free);
  if (budget < model + layout.BlockBytes()) {
    return ResourceExhausted(
        "no room for a KV pool: {}, and --gpu-memory-utilization={:.2f} allows {} in all: {}",
        Figures(memory), memory.utilization, FormatBytes(budget), Remedy(memory, least));
  }
  return PlanPool(layout, budget - model, max_model_len, limit, Remedy(memory, least));
}

}  // namespace tandem::engine
