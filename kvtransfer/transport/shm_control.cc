#include "kvtransfer/transport/shm_control.h"

#include <cerrno>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "common/base/status.h"

namespace tandem::kvtransfer {

absl::StatusOr<SharedMapping> SharedMapping::Map(int fd, size_t bytes) {
  struct stat info = {};
  if (fstat(fd, &info) != 0) return Internal("fstat: {}", ErrnoText(errno));
  // A mapping beyond the end of its file kills the process that touches it.
  if (info.st_size < 0 || static_cast<size_t>(info.st_size) < bytes) {
    return FailedPrecondition("shared memory of {} bytes, expected {}", info.st_size, bytes);
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return ResourceExhausted("mmap: {}", ErrnoText(errno));
  // A forked child with the mapping would be a writer that no pidfd of ours knows.
  (void)madvise(data, bytes, MADV_DONTFORK);
  SharedMapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.size_ = bytes;
  return mapping;
}

SharedMapping::SharedMapping(SharedMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

SharedMapping& SharedMapping::operator=(SharedMapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

SharedMapping::~SharedMapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

std::string ShmGrant::Encode() const {
  std::string text(sizeof(slot) + sizeof(generation), '\0');
  std::memcpy(text.data(), &slot, sizeof(slot));
  std::memcpy(text.data() + sizeof(slot), &generation, sizeof(generation));
  return text;
}

bool ShmGrant::Decode(const std::string& text, ShmGrant* grant) {
  if (text.size() != sizeof(grant->slot) + sizeof(grant->generation)) return false;
  std::memcpy(&grant->slot, text.data(), sizeof(grant->slot));
  std::memcpy(&grant->generation, text.data() + sizeof(grant->slot), sizeof(grant->generation));
  return grant->slot < ShmControlPage::kSlots && grant->generation != 0;
}

absl::StatusOr<std::unique_ptr<ShmControl>> ShmControl::Create() {
  const size_t bytes = kShmControlBytes + kShmScratchBytes;
  Fd fd(memfd_create("tandem-kv-control", MFD_CLOEXEC));
  if (!fd.valid()) return ResourceExhausted("memfd_create: {}", ErrnoText(errno));
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return ResourceExhausted("ftruncate: {}", ErrnoText(errno));
  }
  TANDEM_ASSIGN_OR_RETURN(SharedMapping mapping, SharedMapping::Map(fd.get(), bytes));
  return std::unique_ptr<ShmControl>(new ShmControl(std::move(fd), std::move(mapping)));
}

ShmControl::ShmControl(Fd fd, SharedMapping mapping)
    : fd_(std::move(fd)), mapping_(std::move(mapping)) {
  auto* fresh = new (mapping_.data()) ShmControlPage();  // all zero
  fresh->version = ShmControlPage::kVersion;
  free_.reserve(ShmControlPage::kSlots);
  for (size_t slot = ShmControlPage::kSlots; slot > 0; --slot) {
    free_.push_back(static_cast<uint32_t>(slot - 1));
  }
}

absl::StatusOr<ShmGrant> ShmControl::Grant() {
  absl::MutexLock lock(&mutex_);
  if (free_.empty()) {
    return ResourceExhausted("{} transfers are open on one connection, the limit",
                             ShmControlPage::kSlots);
  }
  const ShmGrant grant = {free_.back(), ++generation_};
  free_.pop_back();
  page()->grants[grant.slot].store(grant.generation, std::memory_order_release);
  return grant;
}

void ShmControl::Revoke(const ShmGrant& grant) {
  page()->grants[grant.slot].store(0, std::memory_order_seq_cst);
}

void ShmControl::Release(const ShmGrant& grant) {
  Revoke(grant);
  absl::MutexLock lock(&mutex_);
  free_.push_back(grant.slot);
}

}  // namespace tandem::kvtransfer
