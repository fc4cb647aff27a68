// A file in memory that has a path, for libraries that read files. What it holds is replaced as a
// whole: who opens the path sees the old or the new contents.
//
// Not thread-safe, but for who reads the path.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/fd.h"

namespace tandem {

class MemFile {
 public:
  static absl::StatusOr<std::unique_ptr<MemFile>> Create(const std::string& contents);

  // For this process alone, as long as this lives.
  std::string path() const;
  absl::Status Replace(const std::string& contents);

 private:
  explicit MemFile(Fd fd) : fd_(std::move(fd)) {}

  const Fd fd_;
};

}  // namespace tandem
