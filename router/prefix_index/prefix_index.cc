// Two maps say the same thing in two directions: holders_ answers a lookup, Worker::blocks answers
// a worker's leaving and keeps each worker within its bound. Every change is made to both under the
// lock, so that a block has a worker in holders_ exactly when the worker has the block.
#include "router/prefix_index/prefix_index.h"

#include <algorithm>

namespace tandem::router {

PrefixIndex::Slot PrefixIndex::AddWorker(size_t max_blocks) {
  absl::MutexLock lock(&mutex_);
  const Slot slot = next_slot_++;
  workers_.emplace(slot, Worker{max_blocks, {}});
  return slot;
}

void PrefixIndex::RemoveWorker(Slot worker) {
  absl::MutexLock lock(&mutex_);
  const auto it = workers_.find(worker);
  if (it == workers_.end()) return;
  for (const Hash128& hash : it->second.blocks) Erase(worker, hash);
  workers_.erase(it);
}

void PrefixIndex::Apply(Slot worker, bool cleared, std::span<const Hash128> stored,
                        std::span<const Hash128> removed) {
  absl::MutexLock lock(&mutex_);
  const auto it = workers_.find(worker);
  if (it == workers_.end()) return;
  Worker& entry = it->second;
  if (cleared) {
    for (const Hash128& hash : entry.blocks) Erase(worker, hash);
    entry.blocks.clear();
  }
  const auto remove = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const Hash128& hash : removed) {
      if (entry.blocks.erase(hash) > 0) Erase(worker, hash);
    }
  };
  // The removals are applied twice. The first time makes room: a worker whose cache is full evicts
  // old blocks for new ones, and the bound would drop the new ones. The second time takes out what
  // was stored and removed within the same message.
  remove();
  for (const Hash128& hash : stored) {
    if (entry.blocks.size() >= entry.max_blocks) break;
    if (entry.blocks.insert(hash).second) holders_[hash].push_back(worker);
  }
  remove();
}

void PrefixIndex::Erase(Slot worker, const Hash128& hash) {
  const auto it = holders_.find(hash);
  if (it == holders_.end()) return;
  Holders& holders = it->second;
  holders.erase(std::remove(holders.begin(), holders.end(), worker), holders.end());
  if (holders.empty()) holders_.erase(it);
}

std::vector<PrefixIndex::Match> PrefixIndex::Lookup(std::span<const Hash128> chain) const {
  std::vector<Match> done, following;
  absl::ReaderMutexLock lock(&mutex_);
  // A worker that lacks block i may be known to hold block i + 1, because what is known is a hint.
  // That block is of no use to it without the one before, so such a worker leaves `following` for
  // good.
  for (size_t i = 0; i < chain.size(); ++i) {
    const auto it = holders_.find(chain[i]);
    if (it == holders_.end()) break;
    const Holders& holders = it->second;
    if (i == 0) {
      for (const Slot worker : holders) following.push_back({worker, 1});
      continue;
    }
    std::erase_if(following, [&](Match& match) {
      if (std::find(holders.begin(), holders.end(), match.worker) != holders.end()) {
        match.blocks = static_cast<int>(i) + 1;
        return false;
      }
      done.push_back(match);
      return true;
    });
    if (following.empty()) break;
  }
  done.insert(done.end(), following.begin(), following.end());
  return done;
}

size_t PrefixIndex::size() const {
  absl::ReaderMutexLock lock(&mutex_);
  return holders_.size();
}

size_t PrefixIndex::WorkerBlocks(Slot worker) const {
  absl::ReaderMutexLock lock(&mutex_);
  const auto it = workers_.find(worker);
  return it == workers_.end() ? 0 : it->second.blocks.size();
}

}  // namespace tandem::router
