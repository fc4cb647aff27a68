#include "common/base/mem_file.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <utility>

#include "common/base/status.h"

namespace tandem {
namespace {

absl::StatusOr<Fd> WriteNew(const std::string& contents) {
  Fd fd(memfd_create("tandem-file", MFD_CLOEXEC));
  if (!fd.valid()) return ResourceExhausted("memfd_create: {}", std::strerror(errno));
  size_t written = 0;
  while (written < contents.size()) {
    const ssize_t n = write(fd.get(), contents.data() + written, contents.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return ResourceExhausted("writing to memory: {}", std::strerror(errno));
    written += static_cast<size_t>(n);
  }
  return fd;
}

}  // namespace

absl::StatusOr<std::unique_ptr<MemFile>> MemFile::Create(const std::string& contents) {
  TANDEM_ASSIGN_OR_RETURN(Fd fd, WriteNew(contents));
  return std::unique_ptr<MemFile>(new MemFile(std::move(fd)));
}

std::string MemFile::path() const { return fmt::format("/proc/self/fd/{}", fd_.get()); }

absl::Status MemFile::Replace(const std::string& contents) {
  TANDEM_ASSIGN_OR_RETURN(const Fd fresh, WriteNew(contents));
  // The number stays and means another file from one moment to the next.
  if (dup3(fresh.get(), fd_.get(), O_CLOEXEC) < 0) {
    return ResourceExhausted("dup3: {}", std::strerror(errno));
  }
  return absl::OkStatus();
}

}  // namespace tandem
