#include "common/text/bpe.h"

#define XXH_INLINE_ALL
#include <algorithm>
#include <functional>
#include <utility>
#include <xxhash.h>

#include "common/base/check.h"

namespace tandem {
namespace {

// Up to this many bytes scanning all pairs for each merge beats a heap.
constexpr size_t kShortPiece = 48;
constexpr uint32_t kNoMerge = UINT32_MAX;

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

size_t TextHash::operator()(std::string_view text) const {
  return XXH3_64bits(text.data(), text.size());
}

BpeModel::BpeModel(const std::array<int32_t, 256>& byte_ids, const std::vector<BpeMerge>& merges)
    : byte_ids_(byte_ids) {
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const BpeMerge& merge = merges[rank];
    merges_[PairKey(merge.left, merge.right)] = {static_cast<uint32_t>(rank), merge.result};
  }
}

void BpeModel::AddWholePiece(std::string bytes, int32_t id, bool always) {
  if (!always) {
    std::vector<int32_t> ids;
    Encode(bytes, &ids);
    if (ids.size() != 1 || ids[0] != id) return;
  }
  whole_pieces_.insert_or_assign(std::move(bytes), id);
}

const BpeModel::Ranked* BpeModel::FindMerge(int32_t left, int32_t right) const {
  const auto it = merges_.find(PairKey(left, right));
  return it == merges_.end() ? nullptr : &it->second;
}

void BpeModel::Encode(std::string_view piece, std::vector<int32_t>* ids) const {
  TANDEM_CHECK(piece.size() <= INT32_MAX, "piece of {} bytes", piece.size());
  if (const auto it = whole_pieces_.find(piece); it != whole_pieces_.end()) {
    ids->push_back(it->second);
  } else if (piece.size() <= kShortPiece) {
    EncodeShort(piece, ids);
  } else {
    EncodeLong(piece, ids);
  }
}

void BpeModel::EncodeShort(std::string_view piece, std::vector<int32_t>* ids) const {
  int32_t symbols[kShortPiece];
  Ranked pairs[kShortPiece];  // pairs[i]: the merge of symbols i and i + 1
  size_t n = piece.size();
  const auto rank_pair = [&](size_t i) {
    const Ranked* merge = i + 1 < n ? FindMerge(symbols[i], symbols[i + 1]) : nullptr;
    pairs[i] = merge == nullptr ? Ranked{kNoMerge, -1} : *merge;
  };
  for (size_t i = 0; i < n; ++i) symbols[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i < n; ++i) rank_pair(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == kNoMerge) break;
    symbols[best] = pairs[best].result;
    std::copy(symbols + best + 2, symbols + n, symbols + best + 1);
    std::copy(pairs + best + 2, pairs + n, pairs + best + 1);
    --n;
    rank_pair(best);
    if (best > 0) rank_pair(best - 1);
  }
  ids->insert(ids->end(), symbols, symbols + n);
}

void BpeModel::EncodeLong(std::string_view piece, std::vector<int32_t>* ids) const {
  struct Symbol {
    int32_t id;  // -1: merged into the symbol on its left
    int32_t previous;
    int32_t next;
  };
  const auto n = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  for (int32_t i = 0; i < n; ++i) {
    symbols[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], i - 1, i + 1 < n ? i + 1 : -1};
  }
  // Min-heap of (rank, position of the left symbol). Entries are not removed when a symbol of
  // theirs merges elsewhere; such an entry is recognised by its rank, since a pair's rank is
  // unique.
  std::vector<uint64_t> heap;
  heap.reserve(piece.size());
  const auto entry = [&](int32_t i, uint64_t* out) {
    const Ranked* merge = FindMerge(symbols[i].id, symbols[symbols[i].next].id);
    if (merge == nullptr) return false;
    *out = uint64_t{merge->rank} << 32 | static_cast<uint32_t>(i);
    return true;
  };
  uint64_t added;
  for (int32_t i = 0; i + 1 < n; ++i) {
    if (entry(i, &added)) heap.push_back(added);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](int32_t i) {
    if (i < 0 || symbols[i].next < 0 || !entry(i, &added)) return;
    heap.push_back(added);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t top = heap.back();
    heap.pop_back();
    const auto i = static_cast<int32_t>(top & UINT32_MAX);
    Symbol& left = symbols[i];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Ranked* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->rank != top >> 32) continue;
    left.id = merge->result;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = i;
    push(left.previous);
    push(i);
  }
  for (int32_t i = 0; i >= 0 && n > 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace tandem
