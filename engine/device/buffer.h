// Memory that a device gave out, and gives back when the buffer ends.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>

namespace tandem::engine {

// Movable. The address stays the same for life. Only what Device says may read through it: memory
// of a GPU is not the host's to touch.
class Buffer {
 public:
  Buffer() = default;
  // `release` is called once, when the buffer ends. `fd`: descriptor of shared memory that holds
  // these bytes from its beginning, for other processes to map; -1: none. It is `release`'s to
  // close.
  Buffer(void* data, size_t size, int fd, std::function<void()> release)
      : data_(data), size_(size), fd_(fd), release_(std::move(release)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(fd_, other.fd_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~Buffer() {
    if (release_) release_();
  }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }  // bytes
  int fd() const { return fd_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
  std::function<void()> release_;
};

}  // namespace tandem::engine
