// Sets of workers in eight bytes each: which of them hold one block.
//
// Not thread-safe. Most blocks are held by a few workers, whose numbers stand in the eight bytes. A
// larger set is kept once, whoever has it: neighbours in a popular prefix are held by the same
// workers, so that a thousand blocks with a hundred holders each cost one set of a hundred. Equal
// sets are equal bytes, which is what lets a walk over a chain skip the blocks between two changes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace tandem::router {

// A worker's small number in the sets; reused, unlike a PrefixIndex::Slot.
using Column = uint16_t;

// A value that HolderSets makes and reads.
class Holders {
 public:
  Holders() { lanes_.fill(kNone); }
  bool operator==(const Holders&) const = default;

 private:
  friend class HolderSets;
  static constexpr Column kNone = 0xffff;
  static constexpr size_t kInline = 4;

  bool shared() const { return lanes_[0] == kNone && lanes_[1] != kNone; }
  uint32_t id() const { return uint32_t{lanes_[2]} << 16 | lanes_[3]; }

  // Ascending, kNone behind the last. Or, for a shared set: kNone, 0 and the two halves of its id.
  std::array<Column, kInline> lanes_;
};

class HolderSets {
 public:
  static constexpr Column kMaxColumns = Holders::kNone;

  // The set with or without `column`. What is given goes: each Holders that a caller keeps stands
  // for one use of its set.
  Holders With(Holders holders, Column column);
  Holders Without(Holders holders, Column column);

  bool Empty(const Holders& holders) const { return holders == Holders(); }
  bool Has(const Holders& holders, Column column) const;
  // Ascending. Good until `holders` or the sets change.
  std::span<const Column> Columns(const Holders& holders) const;
  size_t shared_sets() const { return by_name_.size(); }

 private:
  // What a set became when `column` was last added or taken out. Neighbours in a chain change
  // alike.
  struct Change {
    Column column = Holders::kNone;
    Holders result;
    uint64_t name = 0;  // of the result; another set may have its id by now
  };
  struct Set {
    std::vector<Column> columns;
    uint64_t name = 0;
    uint32_t uses = 0;
    Change added, removed;
  };

  // A set's name is the exclusive or of its columns' names, so that a change of one costs one
  // operation. 64 bits: two sets that were taken for each other would cost wrong hints, no more.
  static uint64_t NameOf(Column column);
  Holders Inline(std::span<const Column> columns) const;
  // Adds a use of the set of that name, made from `columns` if there is none.
  Holders Share(uint64_t name, std::span<const Column> columns);
  bool Reuse(const Change& change);
  void Release(uint32_t id);

  std::vector<Set> sets_;
  std::vector<uint32_t> free_;  // ids
  absl::flat_hash_map<uint64_t, uint32_t> by_name_;
  std::vector<Column> scratch_;
};

}  // namespace tandem::router
