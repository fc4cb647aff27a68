// Blocks are found by one table alone. What a worker holds is only counted: it leaves, or says that
// it holds nothing any more, so seldom that a walk over the whole table is cheaper than a second
// one, of the blocks of each worker, would be in memory and at every event.
#include "router/prefix_index/prefix_index.h"

#include <algorithm>
#include <iterator>
#include <thread>

namespace tandem::router {
namespace {

// Blocks under one hold of the lock: some 20 microseconds.
constexpr size_t kPiece = 128;
// Between the prefetch of a block's entry and its use.
constexpr size_t kAhead = 12;
// How long a change waits for lookups, so that many of them cannot hold it up for good.
constexpr int kMaxYields = 100;

}  // namespace

PrefixIndex::Key PrefixIndex::KeyOf(const Hash128& hash) {
  // Hashes are even already; what tests make up is not.
  uint64_t key = (hash.high ^ (hash.low * 0x9e3779b97f4a7c15ULL)) + hash.low;
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ULL;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebULL;
  return key ^ (key >> 31);
}

void PrefixIndex::Yield() const {
  for (int i = 0; i < kMaxYields && waiting_lookups_.load(std::memory_order_relaxed) > 0; ++i) {
    std::this_thread::yield();
  }
}

PrefixIndex::Slot PrefixIndex::AddWorker(size_t max_blocks) {
  absl::MutexLock lock(&mutex_);
  const Slot slot = next_slot_++;
  Worker worker{max_blocks};
  if (!free_columns_.empty()) {
    worker.column = free_columns_.back();
    free_columns_.pop_back();
    slots_[*worker.column] = slot;
  } else if (slots_.size() < HolderSets::kMaxColumns) {
    worker.column = static_cast<Column>(slots_.size());
    slots_.push_back(slot);
  }
  workers_.emplace(slot, worker);
  return slot;
}

void PrefixIndex::RemoveWorker(Slot worker) {
  Worker removed;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = workers_.find(worker);
    if (it == workers_.end()) return;
    removed = it->second;
    workers_.erase(it);
    if (!removed.column) return;
    slots_[*removed.column] = kNoSlot;
  }
  if (removed.blocks > 0) Sweep(*removed.column);
  absl::MutexLock lock(&mutex_);
  free_columns_.push_back(*removed.column);
}

void PrefixIndex::Sweep(Column column) {
  for (size_t shard = 0; shard < kShards; ++shard) {
    {
      absl::MutexLock lock(&mutex_);
      absl::erase_if(shards_[shard], [&](auto& entry) ABSL_NO_THREAD_SAFETY_ANALYSIS {
        if (!sets_.Has(entry.second, column)) return false;
        entry.second = sets_.Without(entry.second, column);
        return sets_.Empty(entry.second);
      });
    }
    Yield();
  }
}

void PrefixIndex::Apply(Slot worker, bool cleared, std::span<const Hash128> stored,
                        std::span<const Hash128> removed) {
  if (cleared) {
    std::optional<Column> to_sweep;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = workers_.find(worker);
      if (it == workers_.end()) return;
      if (it->second.blocks > 0) to_sweep = it->second.column;
      it->second.blocks = 0;
    }
    if (to_sweep) Sweep(*to_sweep);
  }
  // The removals are applied twice. The first time makes room: a worker whose cache is full evicts
  // old blocks for new ones, and the bound would drop the new ones. The second time takes out what
  // was stored and removed within the same message.
  ApplyInPieces(worker, Change::kRemove, removed);
  ApplyInPieces(worker, Change::kStore, stored);
  if (!stored.empty()) ApplyInPieces(worker, Change::kRemove, removed);
}

void PrefixIndex::ApplyInPieces(Slot worker, Change change, std::span<const Hash128> hashes) {
  while (!hashes.empty()) {
    const std::span<const Hash128> piece = hashes.first(std::min(kPiece, hashes.size()));
    hashes = hashes.subspan(piece.size());
    {
      absl::MutexLock lock(&mutex_);
      const auto it = workers_.find(worker);
      if (it == workers_.end() || !it->second.column) return;
      ApplyPiece(&it->second, change, piece);
    }
    Yield();
  }
}

void PrefixIndex::ApplyPiece(Worker* worker, Change change, std::span<const Hash128> hashes) {
  std::array<Key, kPiece> keys;
  std::transform(hashes.begin(), hashes.end(), keys.begin(), KeyOf);
  for (size_t i = 0; i < std::min(kAhead, hashes.size()); ++i) ShardOf(keys[i]).prefetch(keys[i]);
  for (size_t i = 0; i < hashes.size(); ++i) {
    if (i + kAhead < hashes.size()) ShardOf(keys[i + kAhead]).prefetch(keys[i + kAhead]);
    Shard& shard = ShardOf(keys[i]);
    if (change == Change::kStore) {
      if (worker->blocks >= worker->max_blocks) return;
      Holders& holders = shard[keys[i]];
      const Holders before = holders;
      holders = sets_.With(before, *worker->column);
      if (holders != before) ++worker->blocks;
      continue;
    }
    const auto it = shard.find(keys[i]);
    if (it == shard.end()) continue;
    const Holders before = it->second;
    it->second = sets_.Without(before, *worker->column);
    if (it->second == before) continue;
    --worker->blocks;
    if (sets_.Empty(it->second)) shard.erase(it);
  }
}

std::vector<PrefixIndex::Match> PrefixIndex::Lookup(std::span<const Hash128> chain) const {
  waiting_lookups_.fetch_add(1, std::memory_order_relaxed);
  absl::ReaderMutexLock lock(&mutex_);
  waiting_lookups_.fetch_sub(1, std::memory_order_relaxed);
  std::vector<Match> out;
  const auto leave = [&](Column column, size_t blocks) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (slots_[column] != kNoSlot) out.push_back({slots_[column], static_cast<int>(blocks)});
  };
  // A worker that lacks block i may be known to hold block i + 1, because what is known is a hint.
  // That block is of no use to it without the one before, so such a worker leaves `following` for
  // good.
  std::vector<Column> following, next;
  Holders last;
  std::array<Key, kAhead> keys;  // of the blocks from i on, in a ring
  const auto prefetch = [&](size_t i) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (i >= chain.size()) return;
    keys[i % kAhead] = KeyOf(chain[i]);
    ShardOf(keys[i % kAhead]).prefetch(keys[i % kAhead]);
  };
  size_t i = 0;
  // Only the first blocks at first: many a prompt has no block that is known.
  for (size_t ahead = 0; ahead < 2; ++ahead) prefetch(ahead);
  for (; i < chain.size(); ++i) {
    const Key key = keys[i % kAhead];
    const Shard& shard = ShardOf(key);
    const auto it = shard.find(key);
    if (it == shard.end()) break;
    if (i == 1) {
      for (size_t ahead = 2; ahead < kAhead; ++ahead) prefetch(ahead);
    }
    if (i >= 1) prefetch(i - 1 + kAhead);
    if (it->second == last) continue;
    const std::span<const Column> holders = sets_.Columns(it->second);
    if (i == 0) {
      following.assign(holders.begin(), holders.end());
    } else {
      next.clear();
      size_t h = 0;
      for (const Column column : following) {
        while (h < holders.size() && holders[h] < column) ++h;
        if (h < holders.size() && holders[h] == column) {
          next.push_back(column);
        } else {
          leave(column, i);
        }
      }
      following.swap(next);
      if (following.empty()) break;
    }
    last = it->second;
  }
  for (const Column column : following) leave(column, i);
  return out;
}

size_t PrefixIndex::size() const {
  absl::ReaderMutexLock lock(&mutex_);
  size_t sum = 0;
  for (const Shard& shard : shards_) sum += shard.size();
  return sum;
}

size_t PrefixIndex::WorkerBlocks(Slot worker) const {
  absl::ReaderMutexLock lock(&mutex_);
  const auto it = workers_.find(worker);
  return it == workers_.end() ? 0 : it->second.blocks;
}

}  // namespace tandem::router
