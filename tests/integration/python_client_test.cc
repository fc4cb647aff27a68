// clients/python: installed from the tree with pip, and used against a cluster of `tandem up` that
// wants a key and speaks TLS.
#include <csignal>
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/certificates.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

TEST(PythonClient, InstallsFromTheTreeAndTalksToACluster) {
  TempDir dir;
  // A copy, because setuptools builds in the tree that it is given.
  for (const char* part : {"clients/python", "proto/tandem/v1"}) {
    std::filesystem::create_directories(dir.path() + "/tree/" + part);
    std::filesystem::copy(SourcePath(part), dir.path() + "/tree/" + part,
                          std::filesystem::copy_options::recursive);
  }
  const std::string site = dir.path() + "/site";
  const Completed install =
      RunCommand({"/usr/bin/python3", "-m", "pip", "install", "--quiet",
                  "--disable-pip-version-check", "--no-build-isolation", "--no-deps",
                  "--no-cache-dir", "--target", site, dir.path() + "/tree/clients/python"},
                 120);
  ASSERT_EQ(install.exit_code, 0) << install.err;

  const TestCa ca("test");
  const TestCertificate own = ca.Issue();
  const auto write = [&](const std::string& name, const std::string& text) {
    WriteFile(dir.path() + "/" + name, text);
    return dir.path() + "/" + name;
  };
  const Completed made = RunCommand({BinaryPath("tandem"), "key", "new", "--name", "a"}, 30);
  ASSERT_EQ(made.exit_code, 0) << made.err;
  auto up =
      Process::Spawn({BinaryPath("tandem"), "up", SourcePath("models/demo"), "--port", "0",
                      "--kv-cache-memory-bytes", "64MiB", "--min-step-ms", "5", "--api-keys-file",
                      write("keys.yaml", made.out), "--tls-cert",
                      write("cert.pem", own.certificate), "--tls-key", write("key.pem", own.key)},
                     {}, dir.path() + "/stderr");
  const auto ready = up->ReadLine(60);
  ASSERT_TRUE(ready.has_value() && ready->starts_with("ready "))
      << ReadWholeFile(dir.path() + "/stderr");
  const Completed talk =
      RunCommand({"/usr/bin/env", "PYTHONPATH=" + site,
                  "TANDEM_API_KEY=" + made.err.substr(0, made.err.find('\n')),
                  "TANDEM_TLS_CA=" + write("ca.pem", ca.certificate()), "/usr/bin/python3",
                  SourcePath("tests/integration/python_client.py"), ready->substr(6)},
                 120);
  EXPECT_EQ(talk.exit_code, 0) << talk.err;
  EXPECT_EQ(talk.out, "ok\n");
  up->Signal(SIGTERM);
  EXPECT_EQ(up->Wait(40), 0);
}

}  // namespace
}  // namespace tandem
