#include "router/prefix_index/holder_sets.h"

#include <algorithm>

namespace tandem::router {
namespace {

uint64_t Mix(uint64_t x) {  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t HolderSets::NameOf(Column column) {
  return Mix((uint64_t{column} + 1) * 0x9e3779b97f4a7c15ULL);
}

std::span<const Column> HolderSets::Columns(const Holders& holders) const {
  if (holders.shared()) return sets_[holders.id()].columns;
  size_t count = 0;
  while (count < Holders::kInline && holders.lanes_[count] != Holders::kNone) ++count;
  return {holders.lanes_.data(), count};
}

bool HolderSets::Has(const Holders& holders, Column column) const {
  const std::span<const Column> columns = Columns(holders);
  return std::binary_search(columns.begin(), columns.end(), column);
}

Holders HolderSets::Inline(std::span<const Column> columns) const {
  Holders out;
  std::copy(columns.begin(), columns.end(), out.lanes_.begin());
  return out;
}

Holders HolderSets::Share(uint64_t name, std::span<const Column> columns) {
  const auto [it, is_new] = by_name_.try_emplace(name, 0);
  if (is_new) {
    if (free_.empty()) {
      free_.push_back(static_cast<uint32_t>(sets_.size()));
      sets_.emplace_back();
    }
    it->second = free_.back();
    free_.pop_back();
    Set& set = sets_[it->second];
    set.columns.assign(columns.begin(), columns.end());
    set.name = name;
  }
  ++sets_[it->second].uses;
  Holders out;
  out.lanes_ = {Holders::kNone, 0, static_cast<Column>(it->second >> 16),
                static_cast<Column>(it->second)};
  return out;
}

bool HolderSets::Reuse(const Change& change) {
  if (!change.result.shared()) return true;
  Set& set = sets_[change.result.id()];
  if (set.uses == 0 || set.name != change.name) return false;
  ++set.uses;
  return true;
}

void HolderSets::Release(uint32_t id) {
  Set& set = sets_[id];
  if (--set.uses > 0) return;
  by_name_.erase(set.name);
  set = Set();
  free_.push_back(id);
}

Holders HolderSets::With(Holders holders, Column column) {
  const std::span<const Column> columns = Columns(holders);
  const auto place = std::lower_bound(columns.begin(), columns.end(), column);
  if (place != columns.end() && *place == column) return holders;
  if (holders.shared()) {
    const Change& last = sets_[holders.id()].added;
    if (last.column == column && Reuse(last)) {
      const Holders out = last.result;
      Release(holders.id());
      return out;
    }
  }
  scratch_.assign(columns.begin(), place);
  scratch_.push_back(column);
  scratch_.insert(scratch_.end(), place, columns.end());
  if (scratch_.size() <= Holders::kInline) return Inline(scratch_);
  uint64_t name = NameOf(column);
  if (holders.shared()) {
    name ^= sets_[holders.id()].name;
  } else {
    for (const Column other : columns) name ^= NameOf(other);
  }
  const Holders out = Share(name, scratch_);
  if (holders.shared()) {
    sets_[holders.id()].added = {column, out, name};
    Release(holders.id());
  }
  return out;
}

Holders HolderSets::Without(Holders holders, Column column) {
  const std::span<const Column> columns = Columns(holders);
  const auto place = std::lower_bound(columns.begin(), columns.end(), column);
  if (place == columns.end() || *place != column) return holders;
  if (holders.shared()) {
    const Change& last = sets_[holders.id()].removed;
    if (last.column == column && Reuse(last)) {
      const Holders out = last.result;
      Release(holders.id());
      return out;
    }
  }
  scratch_.assign(columns.begin(), place);
  scratch_.insert(scratch_.end(), place + 1, columns.end());
  if (!holders.shared()) return Inline(scratch_);
  const uint64_t name = sets_[holders.id()].name ^ NameOf(column);
  const Holders out =
      scratch_.size() <= Holders::kInline ? Inline(scratch_) : Share(name, scratch_);
  sets_[holders.id()].removed = {column, out, name};
  Release(holders.id());
  return out;
}

}  // namespace tandem::router
