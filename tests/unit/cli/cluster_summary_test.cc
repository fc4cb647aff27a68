#include "cli/cluster_summary.h"

#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

using testing::HasSubstr;
using testing::Not;

v1::GetClusterResponse Cluster() {
  v1::GetClusterResponse cluster;
  cluster.set_model("demo");
  cluster.set_dtype("bfloat16");
  cluster.set_block_size(16);
  cluster.set_max_model_len(2048);
  for (const char* role : {"decode", "decode", "prefill"}) {
    v1::Worker* worker = cluster.add_workers();
    worker->set_role(role);
    worker->set_blocks_total(1000);
    worker->set_max_num_seqs(64);
  }
  return cluster;
}

TEST(SummaryText, SaysWhatThereIsAndWhatToTypeNext) {
  EXPECT_EQ(SummaryText(Cluster(), {"127.0.0.1:8800", "127.0.0.1:4001", "127.0.0.1:4002"}, 80),
            "\n"
            "  model        demo (bfloat16)\n"
            "  workers      1 prefill, 2 decode\n"
            "  KV cache     32,000 tokens to decode in\n"
            "  longest      2,048 tokens, prompt and answer; 14 of them fit at once\n"
            "  concurrency  128 streams decode at once, more wait\n"
            "  API          127.0.0.1:8800 (gRPC)\n"
            "  operators    127.0.0.1:4001 (internal, workers join there)\n"
            "  metrics      http://127.0.0.1:4002/metrics\n"
            "  try          tandem chat --server 127.0.0.1:8800\n"
            "               tandem status --server 127.0.0.1:8800 --watch\n"
            "  stop         Ctrl-C: streams end first; a second one kills\n"
            "\n");
}

TEST(SummaryText, TheDefaultAddressNeedsNoFlag) {
  const std::string text =
      SummaryText(Cluster(), {"127.0.0.1:8000", "127.0.0.1:4001", "127.0.0.1:4002"}, 80);
  EXPECT_THAT(text, HasSubstr("try          tandem chat\n"));
  EXPECT_THAT(text, Not(HasSubstr("--server")));
}

TEST(SummaryText, NoLineIsWiderThanTheTerminal) {
  v1::GetClusterResponse cluster = Cluster();
  cluster.set_model(std::string(200, 'm'));
  std::istringstream lines(SummaryText(cluster, {"[::1]:8800", "[::1]:4001", "[::1]:4002"}, 60));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 60u) << line;
}

}  // namespace
}  // namespace tandem::cli
