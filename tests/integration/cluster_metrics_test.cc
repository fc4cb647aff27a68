// Every process serves the documented metric names, and they count what happened.
#include <sstream>
#include <string>
#include <utility>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

// Sum of the samples of `name` whose labels contain `label` (both as they stand in the text
// format).
double Sum(const std::string& text, const std::string& name, const std::string& label = "") {
  double sum = 0;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t end = line.find_first_of("{ ");
    if (line.starts_with("#") || line.substr(0, end) != name ||
        line.find(label) == std::string::npos)
      continue;
    sum += std::stod(line.substr(line.rfind(' ') + 1));
  }
  return sum;
}

bool HasFamily(const std::string& text, const std::string& name) {
  return text.find("# TYPE " + name + " ") != std::string::npos;
}

TEST(Metrics, EveryProcessCountsTheRequest) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/small");
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=32MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  constexpr int kRequests = 3;
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(client.Generate(TokenRequest(RandomTokens(200, 512, 7), 12)).status.ok());
  }
  ASSERT_TRUE(cluster->WaitFor(
      [](const auto& state) {
        for (const auto& worker : state.workers()) {
          if (worker.blocks_used() > 0) return false;
        }
        return true;
      },
      10));

  const std::string router = TestCluster::Scrape(cluster->router());
  EXPECT_EQ(Sum(router, "tandem_ttft_seconds_count"), kRequests);
  // The first of the equal prompts was computed, 192 of 200 tokens of the others were cached.
  EXPECT_EQ(Sum(router, "tandem_ttft_seconds_count", "cache=\"miss\""), 1);
  EXPECT_EQ(Sum(router, "tandem_ttft_seconds_count", "cache=\"hit\""), kRequests - 1);
  EXPECT_EQ(Sum(router, "tandem_request_duration_seconds_count"), kRequests);
  EXPECT_GT(Sum(router, "tandem_inter_token_latency_seconds_count"), 0);
  EXPECT_GT(Sum(router, "tandem_time_per_output_token_seconds_count"), 0);
  EXPECT_EQ(Sum(router, "tandem_request_stage_seconds_count", "stage=\"ttft\""), kRequests);
  EXPECT_EQ(Sum(router, "tandem_request_stage_seconds_count", "stage=\"tokenize\""), kRequests);
  EXPECT_EQ(Sum(router, "tandem_router_decisions_total"), kRequests);
  EXPECT_TRUE(HasFamily(router, "tandem_requests_running"));
  EXPECT_TRUE(HasFamily(router, "tandem_requests_waiting"));

  const std::string prefill = TestCluster::Scrape(cluster->worker("prefill-0"));
  EXPECT_EQ(Sum(prefill, "tandem_prefix_cache_query_tokens_total"), 200 * kRequests);
  EXPECT_EQ(Sum(prefill, "tandem_prefix_cache_hit_tokens_total"), 192 * (kRequests - 1));
  EXPECT_GT(Sum(prefill, "tandem_kv_transfer_bytes_total", "dst=\"decode-0\""), 0);
  EXPECT_EQ(Sum(prefill, "tandem_kv_transfer_failures_total"), 0);
  EXPECT_GT(Sum(prefill, "tandem_step_duration_seconds_count"), 0);
  EXPECT_GT(Sum(prefill, "tandem_kv_blocks", "state=\"cached\""), 0);

  const std::string decode = TestCluster::Scrape(cluster->worker("decode-0"));
  EXPECT_GT(Sum(decode, "tandem_step_duration_seconds_count"), 0);
  EXPECT_EQ(Sum(decode, "tandem_preemptions_total"), 0);
  EXPECT_EQ(Sum(decode, "tandem_kv_blocks", "state=\"quarantined\""), 0);
  EXPECT_EQ(Sum(decode, "tandem_worker_requests_running"), 0);

  // One meaning per name: what is summed over all processes is what clients got.
  constexpr int kTokens = 12 * kRequests;
  const auto total = [&](const std::string& name) {
    return Sum(router, name) + Sum(prefill, name) + Sum(decode, name);
  };
  EXPECT_EQ(total("tandem_prompt_tokens_total"), 200 * kRequests);
  EXPECT_EQ(total("tandem_generation_tokens_total"), kTokens);
  EXPECT_EQ(total("tandem_worker_generation_tokens_total"), kTokens);
  EXPECT_EQ(total("tandem_ttft_seconds_count"), kRequests);
  EXPECT_EQ(total("tandem_requests_rejected_total"), 0);

  for (const auto& [page, role] :
       {std::pair(router, "router"), std::pair(prefill, "prefill"), std::pair(decode, "decode")}) {
    const std::string label = fmt::format("role=\"{}\"", role);
    for (const char* name : {"process_resident_memory_bytes", "process_cpu_seconds_total",
                             "process_open_fds", "process_start_time_seconds"}) {
      EXPECT_GT(Sum(page, name, label), 0) << role << " " << name;
    }
    EXPECT_EQ(Sum(page, "tandem_build_info", label), 1) << role;
    // Every sample tells whose it is, and of which model.
    std::istringstream lines(page);
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("tandem_")) continue;
      EXPECT_NE(line.find(label), line.npos) << line;
      EXPECT_NE(line.find("model_name=\"small\""), line.npos) << line;
    }
    const Completed lint = RunCommand({"promtool", "check", "metrics"}, 60, page);
    EXPECT_EQ(lint.exit_code, 0) << lint.out << lint.err << " (promtool: scripts/setup test)";
    EXPECT_EQ(lint.out + lint.err, "") << role;
  }
  EXPECT_EQ(Sum(decode, "tandem_cache_config_info", "block_size=\"16\""), 1);
  EXPECT_GT(Sum(decode, "tandem_model_load_seconds", "worker=\"decode-0\""), 0);
  EXPECT_EQ(Sum(decode, "tandem_kv_usage_ratio"), 0);
}

}  // namespace
}  // namespace tandem
