// Memory that the processes which this one starts share, without a name in any file system.
#pragma once

#include <string>

namespace tandem::cli {

// Empty at first; whoever opens path() may size, fill and seal it. Ends with the object and the
// last process that has it open.
class SharedMemory {
 public:
  explicit SharedMemory(const char* name);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // For processes of the same user, as long as this one lives; "" where the system has none.
  std::string path() const;

 private:
  const int fd_;
};

}  // namespace tandem::cli
