// Memory of this process's host that cards reach: pinned, for as long as this lives.
#pragma once

#include <cstddef>
#include <cuda_runtime.h>
#include <span>
#include <utility>

#include "absl/status/statusor.h"

namespace tandem::kvtransfer::cuda {

class RegisteredPages {
 public:
  // `pages`: whole pages, mapped as long as this lives. RESOURCE_EXHAUSTED names how much was
  // wanted and the limit on it.
  static absl::StatusOr<RegisteredPages> Register(std::span<std::byte> pages);
  RegisteredPages(RegisteredPages&& other) noexcept
      : pages_(std::exchange(other.pages_, {})), device_(other.device_) {}
  RegisteredPages& operator=(RegisteredPages&&) = delete;
  ~RegisteredPages() {
    if (!pages_.empty()) cudaHostUnregister(pages_.data());
  }
  // Where cards find what the host has at `at`.
  template <typename T>
  T* OnCard(T* at) const {
    auto* byte = reinterpret_cast<const std::byte*>(at);
    return reinterpret_cast<T*>(device_ + (byte - pages_.data()));
  }
  std::span<std::byte> pages() const { return pages_; }

 private:
  RegisteredPages() = default;
  std::span<std::byte> pages_;
  std::byte* device_ = nullptr;
};

}  // namespace tandem::kvtransfer::cuda
