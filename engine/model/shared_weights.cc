#include "engine/model/shared_weights.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string_view>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "spdlog/spdlog.h"

#include "common/base/block_hash.h"
#include "common/base/fd.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

constexpr size_t kPage = 4096;
constexpr std::array<char, 8> kMagic = {'t', 'd', 'm', 'w', 'g', 't', 's', '1'};
constexpr int kSeals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr absl::Duration kLockPoll = absl::Milliseconds(10);
// A worker that fills the memory reads a checkpoint; who waits longer than any disk takes goes on
// by itself.
constexpr absl::Duration kLongestWait = absl::Minutes(30);

// The first page; the parts follow it.
struct Header {
  std::array<char, 8> magic;
  std::array<char, 16> key;     // hash
  std::array<char, 16> parts;   // hash of names and sizes, in order
  std::array<char, 16> digest;  // of everything behind the first page
  uint64_t bytes;               // of everything
};

std::array<char, 16> Bytes16(std::string_view hashed) {
  std::array<char, 16> out;
  const std::string bytes = HashBytes(hashed).ToBytes();
  std::copy_n(bytes.begin(), out.size(), out.begin());
  return out;
}

// What was taken so far.
class Parts {
 public:
  // Where the part begins.
  size_t Add(const std::string& name, size_t bytes) {
    const size_t begin = end_;
    names_ += fmt::format("{}:{};", name, bytes);
    end_ += (bytes + kPage - 1) / kPage * kPage;
    return begin;
  }
  size_t end() const { return end_; }
  std::array<char, 16> hash() const { return Bytes16(names_); }

 private:
  std::string names_;
  size_t end_ = kPage;
};

class EmptyArena final : public WeightArena {
 public:
  explicit EmptyArena(int fd) : fd_(fd) {}

  bool filled() const override { return false; }
  absl::StatusOr<Buffer> Take(const std::string& name, size_t bytes) override {
    const size_t begin = parts_.Add(name, bytes);
    if (bytes == 0) return Buffer();
    if (ftruncate(fd_, static_cast<off_t>(parts_.end())) != 0) {
      return Unavailable("{} bytes of shared memory cannot be had: {}", bytes, strerror(errno));
    }
    void* data =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(begin));
    if (data == MAP_FAILED) {
      return Unavailable("{} bytes of shared memory cannot be mapped: {}", bytes, strerror(errno));
    }
    madvise(data, bytes, MADV_HUGEPAGE);
    return Buffer(data, bytes, -1, [data, bytes] { munmap(data, bytes); });
  }
  const Parts& parts() const { return parts_; }

 private:
  const int fd_;
  Parts parts_;
};

// A view of sealed memory.
class FilledArena final : public WeightArena {
 public:
  explicit FilledArena(std::shared_ptr<Buffer> memory) : memory_(std::move(memory)) {}

  bool filled() const override { return true; }
  absl::StatusOr<Buffer> Take(const std::string& name, size_t bytes) override {
    const size_t begin = parts_.Add(name, bytes);
    if (parts_.end() > memory_->size()) {
      return Unavailable("it ends before {}", name);
    }
    if (bytes == 0) return Buffer();
    return Buffer(memory_->as<std::byte>() + begin, bytes, -1, [memory = memory_] {});
  }
  const Parts& parts() const { return parts_; }

 private:
  const std::shared_ptr<Buffer> memory_;
  Parts parts_;
};

absl::StatusOr<Buffer> MapWhole(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0) return Unavailable("it cannot be read: {}", strerror(errno));
  const auto bytes = static_cast<size_t>(info.st_size);
  if (bytes < kPage) return Unavailable("it is no weights of this release");
  // Private: kernels before 6.7 give nobody a shared view of sealed memory. The pages are the same.
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) return Unavailable("it cannot be mapped: {}", strerror(errno));
  madvise(data, bytes, MADV_HUGEPAGE);
  return Buffer(data, bytes, -1, [data, bytes] { munmap(data, bytes); });
}

std::string_view BehindHeader(const Buffer& memory) {
  return {memory.as<const char>() + kPage, memory.size() - kPage};
}

absl::StatusOr<bool> IsSealed(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) return Unavailable("it is no memfd");
  if ((seals & kSeals) == kSeals) return true;
  if (seals & F_SEAL_SEAL) return Unavailable("it is no memfd that can be sealed");
  return false;
}

// Fills the memory, which this process has locked, and seals it.
absl::Status Fill(int fd, const std::string& key,
                  const std::function<absl::Status(WeightArena*)>& fill) {
  if (ftruncate(fd, 0) != 0) return Unavailable("it cannot be emptied: {}", strerror(errno));
  EmptyArena arena(fd);
  TANDEM_RETURN_IF_ERROR(fill(&arena));
  Header header = {kMagic, Bytes16(key), arena.parts().hash(), {}, arena.parts().end()};
  {
    TANDEM_ASSIGN_OR_RETURN(const Buffer memory, MapWhole(fd));
    header.digest = Bytes16(BehindHeader(memory));
  }
  if (pwrite(fd, &header, sizeof(header), 0) != static_cast<ssize_t>(sizeof(header))) {
    return Unavailable("its header cannot be written: {}", strerror(errno));
  }
  if (fcntl(fd, F_ADD_SEALS, kSeals) != 0) {
    return Unavailable("it cannot be sealed: {}", strerror(errno));
  }
  return absl::OkStatus();
}

absl::Status Use(int fd, const std::string& key,
                 const std::function<absl::Status(WeightArena*)>& use) {
  TANDEM_ASSIGN_OR_RETURN(Buffer mapped, MapWhole(fd));
  auto memory = std::make_shared<Buffer>(std::move(mapped));
  Header header;
  std::memcpy(&header, memory->data(), sizeof(header));
  if (header.magic != kMagic || header.bytes != memory->size()) {
    return Unavailable("it is no weights of this release");
  }
  if (header.key != Bytes16(key)) {
    return Unavailable("it holds other weights: another checkpoint, dtype or release");
  }
  if (header.digest != Bytes16(BehindHeader(*memory))) {
    return Unavailable("its digest is wrong");
  }
  FilledArena arena(memory);
  TANDEM_RETURN_IF_ERROR(use(&arena));
  if (arena.parts().hash() == header.parts) return absl::OkStatus();
  return Unavailable("its parts are those of another release");
}

// Waits until nobody else fills the memory. The lock ends with the descriptor.
absl::Status Lock(int fd) {
  const absl::Time deadline = absl::Now() + kLongestWait;
  for (bool said = false; flock(fd, LOCK_EX | LOCK_NB) != 0;) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      return Unavailable("it cannot be locked: {}", strerror(errno));
    }
    if (absl::Now() > deadline) return Unavailable("another worker has filled it for too long");
    if (!std::exchange(said, true)) spdlog::info("another worker loads the weights for all");
    absl::SleepFor(kLockPoll);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status UseSharedWeights(const std::string& path, const std::string& key,
                              const std::function<absl::Status(WeightArena*)>& fill,
                              const std::function<absl::Status(WeightArena*)>& use) {
  // Opened anew by each: a lock belongs to who opened.
  const Fd file(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!file.valid()) return Unavailable("it cannot be opened: {}", strerror(errno));
  TANDEM_ASSIGN_OR_RETURN(bool sealed, IsSealed(file.get()));
  if (!sealed) {
    TANDEM_RETURN_IF_ERROR(Lock(file.get()));
    TANDEM_ASSIGN_OR_RETURN(sealed, IsSealed(file.get()));
    if (!sealed) TANDEM_RETURN_IF_ERROR(Fill(file.get(), key, fill));
    flock(file.get(), LOCK_UN);
  }
  return Use(file.get(), key, use);
}

size_t SharedWeightsSize(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 ? static_cast<size_t>(info.st_blocks) * 512 : 0;
}

}  // namespace tandem::engine
