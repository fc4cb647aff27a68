#include "engine/kv/cached_block_tree.h"

#include "common/base/check.h"

namespace tandem::engine {

CachedBlockTree::CachedBlockTree(int num_blocks) : nodes_(static_cast<size_t>(num_blocks)) {}

void CachedBlockTree::Add(int32_t block, CachedBlockId parent) {
  Node& n = node(block);
  TANDEM_CHECK(n.state == State::kAbsent, "block {} is cached already", block);
  TANDEM_CHECK(Alive(parent), "parent {} of block {} is not cached", parent.block, block);
  n.state = State::kInUse;
  n.parent = parent;
  // Children of an earlier stay named that stay as their parent: they do not count here.
  n.idle_children = 0;
  ++n.stay;
}

void CachedBlockTree::MoveUnder(int32_t block, CachedBlockId parent) {
  // Only a block in use may move: an idle one is counted by its parent.
  Node& n = node(block);
  TANDEM_CHECK(n.state == State::kInUse, "block {} is not in use", block);
  TANDEM_CHECK(Alive(parent), "parent {} of block {} is not cached", parent.block, block);
  n.parent = parent;
}

void CachedBlockTree::Remove(int32_t block) {
  Node& n = node(block);
  TANDEM_CHECK(n.state != State::kAbsent, "block {} is not cached", block);
  if (n.state == State::kIdleLeaf) Unlink(block);
  if (n.state != State::kInUse) {
    --num_idle_;
    ParentLosesIdleChild(n);
  }
  // The children are not visited, which would not be O(1): `stay` changes when the block comes
  // back, so they see by themselves that their parent is gone (Alive).
  n.state = State::kAbsent;
}

void CachedBlockTree::SetIdle(int32_t block, uint64_t stamp) {
  Node& n = node(block);
  TANDEM_CHECK(n.state == State::kInUse, "block {} is not in use", block);
  n.stamp = stamp;
  ++num_idle_;
  if (n.idle_children > 0) {
    n.state = State::kIdleInner;
  } else {
    n.state = State::kIdleLeaf;
    LinkBack(block);
  }
  ParentGainsIdleChild(n);
}

void CachedBlockTree::SetInUse(int32_t block) {
  Node& n = node(block);
  TANDEM_CHECK(IsIdle(block), "block {} is not idle", block);
  if (n.state == State::kIdleLeaf) Unlink(block);
  n.state = State::kInUse;
  --num_idle_;
  ParentLosesIdleChild(n);
}

void CachedBlockTree::ParentGainsIdleChild(const Node& child) {
  if (child.parent.block < 0 || !Alive(child.parent)) return;
  Node& parent = node(child.parent.block);
  ++parent.idle_children;
  // The parent must outlive its children, or they would stay cached where no prompt can reach them.
  if (parent.state == State::kIdleLeaf) {
    Unlink(child.parent.block);
    parent.state = State::kIdleInner;
  }
}

void CachedBlockTree::ParentLosesIdleChild(const Node& child) {
  if (child.parent.block < 0 || !Alive(child.parent)) return;
  Node& parent = node(child.parent.block);
  TANDEM_CHECK(parent.idle_children > 0, "block {} counts no idle child", child.parent.block);
  --parent.idle_children;
  if (parent.state != State::kIdleInner || parent.idle_children > 0) return;
  parent.state = State::kIdleLeaf;
  // A chain that was released together is as old at its head as at its tail, so the rest of it goes
  // before anything younger. A parent that was used after its child, in another chain, has earned a
  // place at the end of the queue.
  if (parent.stamp == child.stamp) {
    LinkFront(child.parent.block);
  } else {
    LinkBack(child.parent.block);
  }
}

void CachedBlockTree::LinkFront(int32_t block) {
  Node& n = node(block);
  n.previous = -1;
  n.next = head_;
  if (head_ >= 0) node(head_).previous = block;
  head_ = block;
  if (tail_ < 0) tail_ = block;
}

void CachedBlockTree::LinkBack(int32_t block) {
  Node& n = node(block);
  n.next = -1;
  n.previous = tail_;
  if (tail_ >= 0) node(tail_).next = block;
  tail_ = block;
  if (head_ < 0) head_ = block;
}

void CachedBlockTree::Unlink(int32_t block) {
  Node& n = node(block);
  (n.previous >= 0 ? node(n.previous).next : head_) = n.next;
  (n.next >= 0 ? node(n.next).previous : tail_) = n.previous;
  n.previous = n.next = -1;
}

}  // namespace tandem::engine
