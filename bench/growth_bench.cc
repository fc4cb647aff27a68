// How costs that grow with the cache and the queue grow: each line should be a constant.
//
//   growth_bench
//
// - block events after a router (re)joins: the whole cache, merged and taken message by message
//   (common/rpc/pending_blocks.h)
// - one look of a prefill worker at 128 prompts that wait (PrefixCache::CountMatch): the first, one
//   after nothing has changed, and one after one block was cached and one became idle
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/time/clock.h"

#include "bench/usage.h"
#include "common/base/locks.h"
#include "common/rpc/pending_blocks.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"

namespace tandem {
namespace {

constexpr int kBlockSize = 16;
constexpr int kWaiting = 128;

double Seconds(absl::Time since) { return absl::ToDoubleSeconds(absl::Now() - since); }

void MeasurePendingBlocks(int hashes) {
  internal::v1::BlockEvents snapshot;
  snapshot.set_cleared(true);
  for (int i = 0; i < hashes; ++i) {
    std::string hash(16, '\0');
    for (int b = 0; b < 4; ++b) hash[static_cast<size_t>(b)] = static_cast<char>(i >> (8 * b));
    snapshot.add_stored(std::move(hash));
  }
  const absl::Time start = absl::Now();
  PendingBlocks pending;
  pending.Merge(snapshot);
  const double merge = Seconds(start);
  double longest = 0;
  while (!pending.empty()) {
    const absl::Time before = absl::Now();
    if (!pending.Take(16384).has_value()) break;
    longest = std::max(longest, Seconds(before));
  }
  std::printf(
      "%9d hashes: merged in %6.1f ms, taken in %6.1f ms, %4.0f ns each; longest hold %.1f ms\n",
      hashes, merge * 1e3, (Seconds(start) - merge) * 1e3, Seconds(start) / hashes * 1e9,
      longest * 1e3);
}

void MeasureLooks(int prompt_tokens) {
  const int blocks = prompt_tokens / kBlockSize;
  engine::BlockPool pool(blocks + 2);
  engine::PrefixCache cache(&pool, kBlockSize, true);
  const Hash128 seed = BlockHashSeed("", "", "");
  std::vector<int32_t> tokens(static_cast<size_t>(prompt_tokens));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % 50000);
  engine::BlockLease lease = *pool.Reserve(blocks);
  cache.Insert(seed, tokens, lease, 0);
  std::vector<engine::PromptMatch> waiting(kWaiting);
  const auto look = [&] {
    const absl::Time start = absl::Now();
    for (engine::PromptMatch& known : waiting) cache.CountMatch(seed, tokens, blocks, &known);
    return Seconds(start);
  };
  const double first = look();
  const double unchanged = look();
  engine::BlockLease other = *pool.Reserve(1);
  cache.Insert(BlockHashSeed("", "", "other"), std::vector<int32_t>(kBlockSize, 1), other, 0);
  other.Release();
  const double changed = look();
  std::printf(
      "%9d tokens, %d prompts: first look %7.2f ms, unchanged %5.3f ms, changed %6.2f ms, %4.1f ns "
      "a block\n",
      prompt_tokens, kWaiting, first * 1e3, unchanged * 1e3, changed * 1e3,
      changed * 1e9 / kWaiting / blocks);
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "growth_bench")) {
    return 0;
  }
  for (const int hashes : {67'000, 312'000, 1'000'000}) tandem::MeasurePendingBlocks(hashes);
  for (const int tokens : {2'000, 32'000, 100'000}) tandem::MeasureLooks(tokens);
  return 0;
}
