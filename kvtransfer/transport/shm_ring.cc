#include "kvtransfer/transport/shm_ring.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <ctime>
#include <new>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#include <linux/futex.h>

#include "common/base/status.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kMaxRingBytes = size_t{4} << 30;

// Has the pages of a mapping that nobody has touched come from `node`, as long as it has some.
void PreferNode(const SharedMapping& mapping, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED
  constexpr int kMaskBits = 64;
  if (node < 0 || node >= kMaskBits) return;
  const uint64_t mask = uint64_t{1} << node;
  // Where that fails (a container without the right to it) the ring is slower, not wrong.
  (void)syscall(SYS_mbind, mapping.data(), mapping.size(), kPreferred, &mask, kMaskBits + 1, 0);
}

}  // namespace

absl::Status CheckRingBytes(size_t bytes, size_t slot_bytes) {
  const size_t least = kRingPageBytes + 2 * slot_bytes;
  if (bytes >= least && bytes <= kMaxRingBytes) return absl::OkStatus();
  return InvalidArgument(
      "--kv-ring-bytes must be at least {} (two frames of this model's blocks, and a page) and at "
      "most {}, got {}",
      least, kMaxRingBytes, bytes);
}

absl::StatusOr<RingMemory> RingMemory::Create(size_t bytes, size_t slot_bytes, int node) {
  TANDEM_RETURN_IF_ERROR(CheckRingBytes(bytes, slot_bytes));
  const size_t num_slots = std::min((bytes - kRingPageBytes) / slot_bytes, RingPage::kMaxSlots);
  Fd fd(memfd_create("tandem-kv-ring", MFD_CLOEXEC));
  if (!fd.valid()) return ResourceExhausted("memfd_create: {}", ErrnoText(errno));
  const size_t size = kRingPageBytes + num_slots * slot_bytes;
  if (ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
    return ResourceExhausted("ftruncate: {}", ErrnoText(errno));
  }
  TANDEM_ASSIGN_OR_RETURN(SharedMapping mapping, SharedMapping::Map(fd.get(), size));
  PreferNode(mapping, node);
  auto* page = new (mapping.data()) RingPage();  // all zero
  page->version = RingPage::kVersion;
  page->num_slots = static_cast<uint32_t>(num_slots);
  page->slot_bytes = slot_bytes;
  return RingMemory(std::move(fd), std::move(mapping));
}

absl::StatusOr<RingMemory> RingMemory::Join(Fd fd, size_t bytes) {
  TANDEM_ASSIGN_OR_RETURN(SharedMapping mapping, SharedMapping::Map(fd.get(), bytes));
  if (bytes < kRingPageBytes) return FailedPrecondition("a ring of {} bytes", bytes);
  RingMemory ring(std::move(fd), std::move(mapping));
  const RingPage& page = *ring.page();
  if (page.version != RingPage::kVersion || ring.num_slots_ < 1 ||
      ring.num_slots_ > RingPage::kMaxSlots || ring.slot_bytes_ < 1 ||
      ring.slot_bytes_ > (bytes - kRingPageBytes) / ring.num_slots_) {
    return FailedPrecondition("a ring of {} slots of {} bytes in {} (version {}, expected {})",
                              ring.num_slots_, ring.slot_bytes_, bytes, page.version,
                              RingPage::kVersion);
  }
  return ring;
}

RingMemory::RingMemory(Fd fd, SharedMapping mapping)
    : fd_(std::move(fd)), mapping_(std::move(mapping)) {
  num_slots_ = page()->num_slots;
  slot_bytes_ = page()->slot_bytes;
}

std::optional<RingPlace> RingWriterSlots::TryTake() {
  seen_ = page_->releases.load(std::memory_order_acquire);
  for (uint32_t slot = 0; slot < used_.size(); ++slot) {
    if (page_->released[slot].load(std::memory_order_acquire) != used_[slot]) continue;
    return RingPlace{slot, ++used_[slot]};
  }
  return std::nullopt;
}

void RingWriterSlots::AwaitRelease(absl::Duration timeout) const {
  static_assert(sizeof(page_->releases) == sizeof(uint32_t));
  const timespec limit = absl::ToTimespec(timeout);
  // Not FUTEX_PRIVATE: the other end is another process.
  (void)syscall(SYS_futex, &page_->releases, FUTEX_WAIT, seen_, &limit, nullptr, 0);
}

RingReaderSlots::RingReaderSlots(const RingMemory& ring)
    : page_(ring.page()),
      slot_bytes_(ring.slot_bytes()),
      taken_(ring.num_slots(), 0),
      released_(ring.num_slots()) {}

absl::StatusOr<RingReaderSlots::Use> RingReaderSlots::Take(RingPlace place, size_t bytes) {
  if (place.slot >= taken_.size() || bytes > slot_bytes_ || place.use < 1) {
    return InvalidArgument("a frame of {} bytes in slot {} (use {}) of {} slots of {} bytes", bytes,
                           place.slot, place.use, taken_.size(), slot_bytes_);
  }
  uint64_t& taken = taken_[place.slot];
  if (place.use <= taken) return Use::kRepeated;
  const uint64_t released = released_[place.slot].load(std::memory_order_acquire);
  if (place.use != taken + 1 || released != taken) {
    return InvalidArgument("slot {} of the ring is used for time {}, but time {} is not over",
                           place.slot, place.use, released + 1);
  }
  taken = place.use;
  return Use::kNew;
}

void RingReaderSlots::Release(RingPlace place) {
  released_[place.slot].store(place.use, std::memory_order_release);
  page_->released[place.slot].store(place.use, std::memory_order_release);
  page_->releases.fetch_add(1, std::memory_order_release);
  (void)syscall(SYS_futex, &page_->releases, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace tandem::kvtransfer
