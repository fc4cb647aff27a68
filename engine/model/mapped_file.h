// A whole file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::engine {

// Movable; the mapping ends with the object. Thread-safe once opened. A file that shrinks while it
// is mapped ends the process with SIGBUS, as every mapped reader: do not edit a model in place.
class MappedFile {
 public:
  // NotFound or InvalidArgument with the path.
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Has the disk fetch these bytes, which will be wanted soon; does not wait.
  void Prefetch(size_t offset, size_t bytes) const;
  // Reads the bytes from `offset` on without the mapping, which would fetch them page by page: the
  // fastest way into other memory. UNAVAILABLE with the path where the disk has them no more.
  absl::Status Read(size_t offset, std::span<std::byte> to) const;

 private:
  MappedFile(std::string path, int fd, const std::byte* data, size_t size)
      : path_(std::move(path)), fd_(fd), data_(data), size_(size) {}
  std::string path_;
  int fd_ = -1;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Anonymous zeroed memory, page-aligned, in huge pages where the kernel gives them: packed weights
// and workspaces. Movable.
class MemoryBlock {
 public:
  MemoryBlock() = default;
  // Dies where memory is refused: sizes are known and checked before.
  explicit MemoryBlock(size_t bytes);
  MemoryBlock(MemoryBlock&& other) noexcept;
  MemoryBlock& operator=(MemoryBlock&& other) noexcept;
  ~MemoryBlock();

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tandem::engine
