// Random sequences of operations on pool and cache, checked against what a naive model knows: which
// tokens' KV each block would hold if it were written by a real engine.
#include <algorithm>
#include <memory>
#include <random>
#include <set>

#include "absl/container/flat_hash_set.h"
#include "gtest/gtest.h"

#include "engine/kv/prefix_cache.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

struct Case {
  uint64_t seed;
  int block_size;
  int hash_values;    // 0: the real hash; else so many different ones, to make collisions common
  bool insert_later;  // equal prompts may be computed side by side
};

class PrefixCacheProperty : public testing::TestWithParam<Case> {
 protected:
  struct Sequence {
    std::vector<int32_t> tokens;
    BlockLease lease;
    int computed = 0;  // blocks
    int inserted = 0;
  };

  static constexpr int kNumBlocks = 24;

  PrefixCacheProperty() : random_(GetParam().seed), block_size_(GetParam().block_size) {
    PrefixCache::ChainHash hash = ChainBlockHash;
    if (const int values = GetParam().hash_values; values > 0) {
      hash = [values](const Hash128& parent, std::span<const int32_t> tokens) {
        return Hash128{0, ChainBlockHash(parent, tokens).low % static_cast<uint64_t>(values)};
      };
    }
    cache_ = std::make_unique<PrefixCache>(&pool_, block_size_, true, hash);
    content_.resize(kNumBlocks);
  }

  int Pick(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  size_t Size(int blocks) const { return static_cast<size_t>(blocks * block_size_); }

  // Prompts branch often: each block is one of two.
  std::vector<int32_t> RandomPrompt() {
    std::vector<int32_t> tokens;
    const int blocks = 1 + Pick(6);
    for (int i = 0; i < blocks; ++i) tokens.insert(tokens.end(), Size(1), Pick(2));
    return tokens;
  }

  void CheckServes(const BlockLease& lease, const std::vector<int32_t>& tokens) {
    for (int i = 0; i < lease.size(); ++i) {
      const std::vector<int32_t>& content = content_[static_cast<size_t>(lease.blocks()[i])];
      ASSERT_EQ(content.size(), Size(i + 1));
      ASSERT_TRUE(std::equal(content.begin(), content.end(), tokens.begin()));
    }
  }

  void Admit() {
    Sequence s{.tokens = RandomPrompt()};
    const int blocks = static_cast<int>(s.tokens.size()) / block_size_;
    int idle = 0;
    const int expected = cache_->CountMatch(seed_, s.tokens, blocks, &idle);
    const int available = pool_.NumAvailable();
    s.lease = cache_->Match(seed_, s.tokens, blocks);
    ASSERT_EQ(s.lease.size(), expected);
    ASSERT_EQ(pool_.NumAvailable(), available - idle);
    CheckServes(s.lease, s.tokens);
    s.computed = s.inserted = s.lease.size();
    const int missing = blocks - s.lease.size();
    const bool fits = missing <= pool_.NumAvailable();
    absl::StatusOr<BlockLease> rest = pool_.Reserve(missing);
    ASSERT_EQ(rest.ok(), fits);
    if (!fits) return;
    for (const int32_t block : rest->blocks()) content_[static_cast<size_t>(block)].clear();
    s.lease.Append(*std::move(rest));
    sequences_.push_back(std::move(s));
    if (!GetParam().insert_later) Advance(sequences_.back(), blocks);
  }

  // Computes up to `blocks` more blocks and tells the cache.
  void Advance(Sequence& s, int blocks) {
    const int end = std::min(s.computed + blocks, s.lease.size());
    for (int i = s.computed; i < end; ++i) {
      content_[static_cast<size_t>(s.lease.blocks()[i])] = {s.tokens.begin(),
                                                            s.tokens.begin() + Size(i + 1)};
    }
    s.computed = end;
    // From the beginning, the cache repairs what evictions took out of the middle.
    const bool from_beginning = Pick(2) == 0;
    cache_->Insert(seed_, std::span(s.tokens).first(Size(end)), s.lease,
                   from_beginning ? 0 : s.inserted);
    s.inserted = end;
    if (GetParam().hash_values == 0 && from_beginning) {
      ASSERT_EQ(cache_->CountMatch(seed_, std::span(s.tokens).first(Size(end)), end), end);
    }
  }

  void End(bool quarantine) {
    if (sequences_.empty()) return;
    std::swap(sequences_[Pick(sequences_.size())], sequences_.back());
    if (quarantine) {
      tickets_.push_back(pool_.Quarantine(std::move(sequences_.back().lease)));
    }
    sequences_.pop_back();
  }

  void Step() {
    switch (Pick(10)) {
      case 0:
      case 1:
      case 2:
        return Admit();
      case 3:
      case 4:
      case 5:
        if (!sequences_.empty()) Advance(sequences_[Pick(sequences_.size())], 1 + Pick(3));
        return;
      case 6:
      case 7:
        return End(false);
      case 8:
        if (Pick(4) == 0) End(true);
        if (!tickets_.empty() && Pick(2) == 0) {
          pool_.ReleaseQuarantine(tickets_.back());
          tickets_.pop_back();
        }
        return;
      default:
        if (Pick(20) == 0) cache_->Clear();
        return;
    }
  }

  void CheckInvariants() {
    std::set<int32_t> used;
    for (const Sequence& s : sequences_)
      used.insert(s.lease.blocks().begin(), s.lease.blocks().end());
    const BlockPoolCounts counts = pool_.counts();
    ASSERT_EQ(counts.used, static_cast<int>(used.size()));
    ASSERT_EQ(counts.free + counts.cached + counts.used + counts.quarantined, kNumBlocks);
    for (const Sequence& s : sequences_) {
      for (int i = 0; i < s.computed; ++i) {
        const std::vector<int32_t>& content = content_[static_cast<size_t>(s.lease.blocks()[i])];
        ASSERT_TRUE(std::equal(content.begin(), content.end(), s.tokens.begin(),
                               s.tokens.begin() + Size(i + 1)));
      }
    }
    const BlockEvents events = cache_->TakeEvents();
    for (const Hash128& hash : events.stored) ASSERT_TRUE(known_.insert(hash).second);
    for (const Hash128& hash : events.removed) ASSERT_EQ(known_.erase(hash), 1u);
    const std::vector<Hash128> snapshot = cache_->Snapshot();
    ASSERT_EQ(snapshot.size(), known_.size());
    for (const Hash128& hash : snapshot) ASSERT_TRUE(known_.contains(hash));
    if (GetParam().hash_values == 0 && !GetParam().insert_later) CheckReachable();
  }

  // Where nothing is computed twice, every cached block can be reached from its prompt's head.
  void CheckReachable() {
    int reachable = 0;
    std::vector<std::vector<int32_t>> level = {{}};
    for (int depth = 1; depth <= 6; ++depth) {
      std::vector<std::vector<int32_t>> next;
      for (const std::vector<int32_t>& prefix : level) {
        for (int value = 0; value < 2; ++value) {
          std::vector<int32_t> tokens = prefix;
          tokens.insert(tokens.end(), Size(1), value);
          if (cache_->CountMatch(seed_, tokens, depth) < depth) continue;
          ++reachable;
          next.push_back(std::move(tokens));
        }
      }
      level = std::move(next);
    }
    ASSERT_EQ(reachable, static_cast<int>(known_.size()));
  }

  std::mt19937_64 random_;
  const int block_size_;
  const Hash128 seed_ = BlockHashSeed("", "model", "");
  BlockPool pool_{kNumBlocks};
  std::unique_ptr<PrefixCache> cache_;
  std::vector<std::vector<int32_t>> content_;  // by block: the prefix whose last block it holds
  std::vector<Sequence> sequences_;
  std::vector<uint64_t> tickets_;
  absl::flat_hash_set<Hash128> known_;
};

TEST_P(PrefixCacheProperty, NeverServesWrongBlocksAndLeaksNone) {
  for (int i = 0; i < 4000; ++i) {
    Step();
    ASSERT_NO_FATAL_FAILURE(CheckInvariants()) << "after operation " << i;
  }
  sequences_.clear();
  for (const uint64_t ticket : tickets_) pool_.ReleaseQuarantine(ticket);
  EXPECT_EQ(pool_.NumAvailable(), kNumBlocks);
  EXPECT_OK(pool_.Reserve(kNumBlocks));
}

INSTANTIATE_TEST_SUITE_P(Random, PrefixCacheProperty,
                         testing::Values(Case{1, 16, 0, false}, Case{2, 16, 0, true},
                                         Case{3, 32, 0, true}, Case{4, 64, 0, false},
                                         Case{5, 128, 0, true}, Case{6, 256, 0, false},
                                         Case{7, 16, 3, false}, Case{8, 16, 3, true},
                                         Case{9, 16, 12, false}, Case{10, 16, 12, true}));

}  // namespace
}  // namespace tandem::engine
