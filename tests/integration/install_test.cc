// `cmake --install` into a prefix of its own gives programs that run, and what belongs to them.
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

TEST(Install, ProgramsDocumentsAndInterfaces) {
  TempDir prefix;
  const std::string build =
      std::filesystem::path(BinaryPath("tandem")).parent_path().parent_path().string();
  const Completed install =
      RunCommand({"cmake", "--install", build, "--prefix", prefix.path()}, 120);
  ASSERT_EQ(install.exit_code, 0) << install.err;
  for (const char* file :
       {"bin/tandem_router", "bin/tandem_prefill_worker", "bin/tandem_decode_worker",
        "share/tandem/proto/tandem/v1/inference.proto", "share/tandem/models/demo/config.json",
        "share/doc/tandem/LICENSE", "share/doc/tandem/README.md", "share/doc/tandem/docs/flags.md",
        "share/doc/tandem/systemd/tandem-router.service",
        "share/bash-completion/completions/tandem"}) {
    EXPECT_TRUE(std::filesystem::is_regular_file(prefix.path() + "/" + file)) << file;
  }
  const std::string tandem = prefix.path() + "/bin/tandem";
  const Completed version = RunCommand({tandem, "version"}, 60);
  EXPECT_EQ(version.exit_code, 0) << version.err;
  EXPECT_THAT(version.out, testing::HasSubstr("commit "));
  // Finds the servers beside it.
  const Completed help = RunCommand({tandem, "up", "--help=all"}, 60);
  EXPECT_THAT(help.out, testing::HasSubstr("--max-num-seqs"));
}

}  // namespace
}  // namespace tandem
