// main of every test program: gives it a folder of its own, which goes when it ends. What a test or
// a program that it starts leaves behind (the notes and sockets of a cluster, a model made up) is
// then never found by another test, by a later run, or by the user whose machine this is.
//
// --file=NAME.cc runs the tests of that source alone.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
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

// Leaves the tests of one source in GoogleTest's filter. Returns whether there are any.
bool KeepFile(std::string_view file) {
  std::string own, others;
  const testing::UnitTest& unit = *testing::UnitTest::GetInstance();
  for (int i = 0; i < unit.total_test_suite_count(); ++i) {
    const testing::TestSuite& suite = *unit.GetTestSuite(i);
    for (int j = 0; j < suite.total_test_count(); ++j) {
      const testing::TestInfo& test = *suite.GetTestInfo(j);
      std::string& names = std::filesystem::path(test.file()).filename() == file ? own : others;
      names += std::string(names.empty() ? "" : ":") + suite.name() + "." + test.name();
    }
  }
  std::string& filter = testing::GTEST_FLAG(filter);
  if (filter == "*") {
    filter = own;
  } else if (!others.empty()) {
    filter += (filter.find('-') == std::string::npos ? "-" : ":") + others;
  }
  return !own.empty();
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleMock(&argc, argv);
  constexpr std::string_view kFile = "--file=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.substr(0, kFile.size()) != kFile) continue;
    if (KeepFile(argument.substr(kFile.size()))) continue;
    std::fprintf(stderr, "%s: no test of this program stands in that file\n", argv[i]);
    return 2;
  }
  const std::string folder = std::getenv(kMark) == nullptr ? MakeFolder() : "";
  const int exit_code = RUN_ALL_TESTS();
  std::error_code ignored;
  if (!folder.empty()) std::filesystem::remove_all(folder, ignored);
  return exit_code;
}
