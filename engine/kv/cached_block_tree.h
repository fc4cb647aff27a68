// Which cached blocks continue which, and in what order unreferenced ones are given up.
//
// Cached blocks form a forest: a block's parent holds the tokens before its own. A block may be
// given up only after all its idle children, so a chain always shrinks from its tail and what stays
// cached stays reachable from its head. Among the blocks without idle children, the least recently
// used goes first. When that exposes its parent, the parent follows at once if it was last used
// together with the child, and else queues up as recently used.
//
// Not thread-safe. Every operation is O(1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tandem::engine {

// A cached block in one stay in the cache: stays distinguishable after the block was reused.
struct CachedBlockId {
  int32_t block = -1;  // -1: before the first block of a prompt
  uint64_t stay = 0;

  bool operator==(const CachedBlockId&) const = default;
};

class CachedBlockTree {
 public:
  explicit CachedBlockTree(int num_blocks);

  // `block` enters the cache, in use, as a continuation of `parent`.
  void Add(int32_t block, CachedBlockId parent);
  // Hangs a block in use under another parent with the same content.
  void MoveUnder(int32_t block, CachedBlockId parent);
  // `block` leaves the cache, idle or in use. Its children, if any, become orphans.
  void Remove(int32_t block);

  // The last reference to `block` is gone. Blocks with the same `stamp` were released together.
  void SetIdle(int32_t block, uint64_t stamp);
  void SetInUse(int32_t block);

  bool Contains(int32_t block) const { return node(block).state != State::kAbsent; }
  bool IsIdle(int32_t block) const {
    return node(block).state == State::kIdleLeaf || node(block).state == State::kIdleInner;
  }
  CachedBlockId Id(int32_t block) const { return {block, node(block).stay}; }
  CachedBlockId ParentOf(int32_t block) const { return node(block).parent; }
  // Whether `id` is still cached, in the same stay. True for the root.
  bool Alive(CachedBlockId id) const {
    return id.block < 0 || (Contains(id.block) && node(id.block).stay == id.stay);
  }
  // A block whose parent left the cache: no prompt can reach it.
  bool IsOrphan(int32_t block) const { return !Alive(node(block).parent); }

  int num_idle() const { return num_idle_; }
  // The block to give up next: -1 if none is idle. Does not remove it.
  int32_t Victim() const { return head_; }

 private:
  enum class State : uint8_t { kAbsent, kInUse, kIdleLeaf, kIdleInner };
  struct Node {
    State state = State::kAbsent;
    CachedBlockId parent;
    uint64_t stay = 0;
    uint64_t stamp = 0;
    int idle_children = 0;
    int32_t previous = -1;  // in the list of idle leaves
    int32_t next = -1;
  };

  const Node& node(int32_t block) const { return nodes_[static_cast<size_t>(block)]; }
  Node& node(int32_t block) { return nodes_[static_cast<size_t>(block)]; }
  void LinkFront(int32_t block);
  void LinkBack(int32_t block);
  void Unlink(int32_t block);
  void ParentGainsIdleChild(const Node& child);
  void ParentLosesIdleChild(const Node& child);

  std::vector<Node> nodes_;
  int32_t head_ = -1;  // list of idle leaves: next to be given up ...
  int32_t tail_ = -1;  // ... to most recently used
  int num_idle_ = 0;
};

}  // namespace tandem::engine
