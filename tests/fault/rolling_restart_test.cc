// Every worker of a running cluster is drained and started again, one after the other, as an
// operator would: no stream fails and no token is wrong, however long the answers are.
#include <cstdio>
#include <map>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/checked_load.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

constexpr double kRestartSeconds = 60;

// The addresses of the workers that are ready.
std::map<std::string, std::string> ReadyWorkers(const std::string& server) {
  std::map<std::string, std::string> ready;
  const Completed status =
      RunCommand({BinaryPath("tandem"), "status", "--json", "--server", server}, 30);
  if (status.exit_code != 0) return ready;
  const auto cluster = nlohmann::json::parse(status.out);
  for (const auto& worker : cluster.at("workers")) {
    if (worker.at("state") == "ready") ready[worker.at("worker_id")] = worker.at("address");
  }
  return ready;
}

// Another process of that name is ready.
bool WaitForSuccessor(const std::string& server, const std::string& id,
                      const std::string& old_address) {
  for (int i = 0; i < kRestartSeconds * 5; ++i) {
    const auto ready = ReadyWorkers(server);
    const auto it = ready.find(id);
    if (it != ready.end() && it->second != old_address) return true;
    SleepMilliseconds(200);
  }
  return false;
}

TEST(RollingRestart, OfAllWorkersUnderLoadFailsNoStream) {
  ClusterSpec unified;
  unified.model_dir = SourcePath("models/demo");
  unified.prefill = unified.decode = 0;
  unified.unified = 1;
  unified.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  const auto undisturbed = TestCluster::Start(unified);
  ASSERT_NE(undisturbed, nullptr);

  TempDir dir;
  // Answers take several times the drain timeout.
  const auto up = Process::Spawn(
      {BinaryPath("tandem"), "up", "--model", SourcePath("models/demo"), "--prefill", "2",
       "--decode", "2", "--port", "0", "--device=cpu", "--dtype=float32", "--num-threads=1",
       "--kv-cache-memory-bytes=128MiB", "--local-prefill-max-tokens=16", "--drain-timeout=0.5"},
      {}, dir.path() + "/stderr");
  std::string ready, server;
  std::istringstream(up->ReadLine(60).value_or("")) >> ready >> server;
  const auto workers = ReadyWorkers(server);
  ASSERT_EQ(workers.size(), 4u) << ReadWholeFile(dir.path() + "/stderr");

  LoadOptions options;
  options.address = server;
  options.undisturbed = undisturbed->channel();
  options.vocab = kDemoVocab;
  options.longest_prompt = 600;
  options.longest_answer = 1200;
  options.clients = 6;
  options.seed = 1;
  CheckedLoad load(options);
  for (const auto& [id, address] : workers) {
    SleepMilliseconds(1000);
    const Completed drain = RunCommand({BinaryPath("tandem"), "drain", id, "--server", server}, 30);
    EXPECT_EQ(drain.exit_code, 0) << drain.err;
    EXPECT_TRUE(WaitForSuccessor(server, id, address)) << id << "\n"
                                                       << ReadWholeFile(dir.path() + "/stderr");
  }
  load.Stop();
  const LoadTotals totals = load.totals();
  std::printf("%s\n", totals.ToString().c_str());
  for (const std::string& wrong : totals.wrong) ADD_FAILURE() << wrong;
  EXPECT_EQ(totals.by_status.at("OK"), totals.requests);
  EXPECT_GT(totals.migrations, 0);
}

}  // namespace
}  // namespace tandem
