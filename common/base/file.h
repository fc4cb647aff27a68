// Whole files, and paths.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace tandem {

// NotFound, or InvalidArgument for a directory or anything over `max_bytes`; messages carry the
// path.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes = size_t{1} << 30);
bool FileExists(const std::string& path);
// OK if `path` is a directory; NotFound or InvalidArgument with a message that names `flag`
// otherwise.
absl::Status CheckModelDir(const std::string& flag, const std::string& path);

}  // namespace tandem
