// Files of a test.
#pragma once

#include <string>

namespace tandem {

// A fresh directory under TMPDIR, removed with the object.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

void WriteFile(const std::string& path, const std::string& content);
std::string ReadWholeFile(const std::string& path);

}  // namespace tandem
