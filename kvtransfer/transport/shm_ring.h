// The ring of the transport shm_ring: memory of the host that two processes map, in slots of one
// size. A frame takes one slot. The writer may use a slot again when the reader has released it;
// which slot a frame is in, and for the how-manieth time, its header says (RingPlace), so that
// frames that are lost, repeated or out of order harm nobody else.
//
// Nothing here knows pools, cards or connections. The reader makes the memory and trusts nothing
// that the writer says: a slot that does not follow from what came before ends the connection, and
// bytes that were changed behind its back fail their digest.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/transport/posix_fd.h"
#include "kvtransfer/transport/shm_control.h"

namespace tandem::kvtransfer {

// The layout of the page in front of the slots; both ends are built from this file, and the version
// says so.
struct RingPage {
  static constexpr uint32_t kVersion = 1;
  static constexpr size_t kMaxSlots = 256;

  uint32_t version;
  uint32_t num_slots;
  uint64_t slot_bytes;
  std::atomic<uint32_t> releases;             // counts them; a futex
  std::atomic<uint64_t> released[kMaxSlots];  // the last use of the slot that is over
};
inline constexpr size_t kRingPageBytes = 4096;
static_assert(sizeof(RingPage) <= kRingPageBytes);

// A slot and its how-manieth use, from 1 on.
struct RingPlace {
  uint32_t slot = 0;
  uint64_t use = 0;

  uint64_t Encode() const { return use << 8 | slot; }
  static RingPlace Decode(uint64_t code) { return {static_cast<uint32_t>(code & 0xff), code >> 8}; }
  bool operator==(const RingPlace&) const = default;
};

// INVALID_ARGUMENT, naming the flag, if a ring of `bytes` has no room for two slots.
absl::Status CheckRingBytes(size_t bytes, size_t slot_bytes);

// A mapping of the ring at either end. Movable.
class RingMemory {
 public:
  // `bytes` of memory, the page included, on NUMA node `node` (-1: any) in slots of `slot_bytes`,
  // a multiple of 4096. INVALID_ARGUMENT as CheckRingBytes().
  static absl::StatusOr<RingMemory> Create(size_t bytes, size_t slot_bytes, int node);
  // What another process has made. FAILED_PRECONDITION for what Create() does not make.
  static absl::StatusOr<RingMemory> Join(Fd fd, size_t bytes);

  int fd() const { return fd_.get(); }
  size_t bytes() const { return mapping_.size(); }
  RingPage* page() const { return reinterpret_cast<RingPage*>(mapping_.data()); }
  std::span<std::byte> slots() const {
    return {mapping_.data() + kRingPageBytes, num_slots_ * slot_bytes_};
  }
  // From the beginning of slots().
  size_t OffsetOf(uint32_t slot) const { return slot * slot_bytes_; }
  // As they were when it was mapped: the other process can write the page.
  size_t num_slots() const { return num_slots_; }
  size_t slot_bytes() const { return slot_bytes_; }

 private:
  RingMemory(Fd fd, SharedMapping mapping);

  Fd fd_;
  SharedMapping mapping_;
  size_t num_slots_ = 0;
  size_t slot_bytes_ = 0;
};

// The writer's part. Belongs to one thread at a time.
class RingWriterSlots {
 public:
  explicit RingWriterSlots(const RingMemory& ring) : page_(ring.page()), used_(ring.num_slots()) {}

  // A slot that nobody uses, if there is one.
  std::optional<RingPlace> TryTake();
  // Waits until the reader releases a slot, or has since the last TryTake(); at most `timeout`.
  void AwaitRelease(absl::Duration timeout) const;

 private:
  RingPage* const page_;
  std::vector<uint64_t> used_;  // by slot: its last use
  uint32_t seen_ = 0;           // RingPage::releases before the last look at the slots
};

// The reader's. Take() belongs to one thread; Release() to any, of one slot to one at a time.
class RingReaderSlots {
 public:
  explicit RingReaderSlots(const RingMemory& ring);

  enum class Use { kNew, kRepeated };
  // The frame at `place`, of `bytes`. kNew: its bytes are there until Release(). INVALID_ARGUMENT
  // where an honest writer would not put it.
  absl::StatusOr<Use> Take(RingPlace place, size_t bytes);
  void Release(RingPlace place);

 private:
  RingPage* const page_;
  const size_t slot_bytes_;
  std::vector<uint64_t> taken_;  // by slot: its last use
  std::vector<std::atomic<uint64_t>>
      released_;  // the same of Release(), which the peer cannot write
};

}  // namespace tandem::kvtransfer
