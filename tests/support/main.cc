// main of every test program: gives it a folder of its own, which goes when it ends. What a test or
// a program that it starts leaves behind (the notes and sockets of a cluster, a model made up) is
// then never found by another test, by a later run, or by the user whose machine this is.
#include <cstdlib>
#include <filesystem>
#include <string>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace {

// testing::TempDir(), std::filesystem's and the place of `tandem up`'s notes.
constexpr const char* kFolders[] = {"TEST_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR"};
// Says to a program that a death test starts anew that the folder is there and is not its own.
constexpr char kMark[] = "TANDEM_TEST_FOLDER";

std::string MakeFolder() {
  std::string path = (std::filesystem::temp_directory_path() / "tandem-XXXXXX").string();
  if (mkdtemp(path.data()) == nullptr) std::abort();
  setenv(kMark, path.c_str(), 1);
  for (const char* variable : kFolders) setenv(variable, path.c_str(), 1);
  return path;
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleMock(&argc, argv);
  const std::string folder = std::getenv(kMark) == nullptr ? MakeFolder() : "";
  const int exit_code = RUN_ALL_TESTS();
  std::error_code ignored;
  if (!folder.empty()) std::filesystem::remove_all(folder, ignored);
  return exit_code;
}
