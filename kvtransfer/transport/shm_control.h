// The page (and a scratch area) that a receiver shares with one writer of its pool: who may write,
// and whether the writer has ended. The memory is the receiver's; what the peer writes there is
// never trusted for more than its own end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

#include "kvtransfer/transport/posix_fd.h"

namespace tandem::kvtransfer {

// A shared mapping of a descriptor. Movable; unmaps.
class SharedMapping {
 public:
  SharedMapping() = default;
  // Maps the first `bytes` of `fd`. FAILED_PRECONDITION if the file is smaller. A child that this
  // process forks does not inherit it.
  static absl::StatusOr<SharedMapping> Map(int fd, size_t bytes);
  SharedMapping(SharedMapping&& other) noexcept;
  SharedMapping& operator=(SharedMapping&& other) noexcept;
  ~SharedMapping();
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The layout of the shared page; both ends are built from this file, and the version says so.
struct ShmControlPage {
  static constexpr uint32_t kVersion = 2;
  static constexpr size_t kSlots = 1000;  // transfers of one writer that may be open at a time

  uint32_t version;
  std::atomic<uint32_t> detached;  // set by the writer: it writes no more, whatever comes
  // Copies that the writer gave to a card and does not know to have ended.
  std::atomic<uint32_t> copies_under_way;
  std::atomic<uint64_t> grants[kSlots];  // generation of the transfer that may be written; 0: none
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

inline constexpr size_t kShmControlBytes = 8192;
// Behind the page: scratch memory for link probes, a place for each that may be under way.
inline constexpr size_t kShmProbeFrames = 4;
inline constexpr size_t kShmProbeBytes = size_t{256} << 10;
inline constexpr size_t kShmScratchBytes = kShmProbeFrames * kShmProbeBytes;
static_assert(sizeof(ShmControlPage) <= kShmControlBytes);

// A transfer's leave to write: a slot of the page and the generation that it must hold. Never used
// twice, so that a late writer cannot mistake its successor's grant for its own.
struct ShmGrant {
  uint32_t slot = 0;
  uint64_t generation = 0;

  std::string Encode() const;
  // False for anything that Encode does not make.
  static bool Decode(const std::string& text, ShmGrant* grant);
};

// The receiver's side. Thread-safe.
class ShmControl {
 public:
  static absl::StatusOr<std::unique_ptr<ShmControl>> Create();

  int fd() const { return fd_.get(); }
  // RESOURCE_EXHAUSTED if kSlots transfers are open.
  absl::StatusOr<ShmGrant> Grant();
  void Revoke(const ShmGrant& grant);
  // The slot may be granted again: the writer is known to have stopped.
  void Release(const ShmGrant& grant);
  // kShmScratchBytes.
  const std::byte* scratch() const { return mapping_.data() + kShmControlBytes; }
  bool detached() const { return page()->detached.load(std::memory_order_acquire) != 0; }
  bool copies_under_way() const {
    return page()->copies_under_way.load(std::memory_order_acquire) != 0;
  }

 private:
  ShmControl(Fd fd, SharedMapping mapping);
  ShmControlPage* page() const { return reinterpret_cast<ShmControlPage*>(mapping_.data()); }

  const Fd fd_;
  const SharedMapping mapping_;
  absl::Mutex mutex_;
  uint64_t generation_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::kvtransfer
