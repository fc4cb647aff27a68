#include "cli/shared_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include "fmt/format.h"

namespace tandem::cli {

SharedMemory::SharedMemory(const char* name)
    : fd_(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)) {}

SharedMemory::~SharedMemory() {
  if (fd_ >= 0) close(fd_);
}

std::string SharedMemory::path() const {
  return fd_ < 0 ? "" : fmt::format("/proc/{}/fd/{}", getpid(), fd_);
}

}  // namespace tandem::cli
