#include "engine/model/mapped_file.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::engine {

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const int error = errno;
    return error == ENOENT ? NotFound("{}: no such file", path)
                           : InvalidArgument("{}: cannot be opened: {}", path, strerror(error));
  }
  struct stat info;
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  void* data = nullptr;
  if (regular && info.st_size > 0) {
    data = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
  }
  const int error = errno;
  if (!regular || data == MAP_FAILED) {
    close(fd);
    if (!regular) return InvalidArgument("{}: not a regular file", path);
    return InvalidArgument("{}: cannot be mapped: {}", path, strerror(error));
  }
  return MappedFile(path, fd, static_cast<const std::byte*>(data),
                    static_cast<size_t>(info.st_size));
}

void MappedFile::Prefetch(size_t offset, size_t bytes) const {
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED);
}

absl::Status MappedFile::Read(size_t offset, std::span<std::byte> to) const {
  Prefetch(offset, to.size());  // the whole range at once: the kernel's own read-ahead begins small
  while (!to.empty()) {
    const ssize_t n = pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      return Unavailable("{}: cannot be read at byte {}: {}", path_, offset,
                         n < 0 ? strerror(errno) : "it has become shorter");
    }
    offset += static_cast<size_t>(n);
    to = to.subspan(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
  if (fd_ >= 0) close(fd_);
}

MemoryBlock::MemoryBlock(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TANDEM_CHECK(data_ != MAP_FAILED, "no memory for {} bytes: {}", bytes, strerror(errno));
  madvise(data_, bytes, MADV_HUGEPAGE);
}

MemoryBlock::MemoryBlock(MemoryBlock&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MemoryBlock& MemoryBlock::operator=(MemoryBlock&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MemoryBlock::~MemoryBlock() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace tandem::engine
