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
  const auto remove = [&] {
    for (const Hash128& hash : removed) {
      if (entry.blocks.erase(hash) > 0) Erase(worker, hash);
    }
  };
  // Twice, with the same result as once at the end: a full cache evicts what it stores instead of,
  // and the new blocks must find room.
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
