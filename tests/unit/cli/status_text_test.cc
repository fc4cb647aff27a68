#include "cli/status_text.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/unit/cli/widest_line.h"

namespace tandem::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

v1::Worker WorkerOf(const std::string& id, const std::string& role, const std::string& state) {
  v1::Worker worker;
  worker.set_worker_id(id);
  worker.set_role(role);
  worker.set_state(state);
  worker.set_address("127.0.0.1:43211");
  worker.set_metrics_address("127.0.0.1:43212");
  worker.set_running(12);
  worker.set_blocks_total(1000);
  worker.set_blocks_used(110);
  worker.set_blocks_quarantined(10);
  worker.set_blocks_cached(300);
  worker.set_uptime_seconds(134);
  worker.set_prefill_tokens_per_second(5'432);
  if (role != "prefill") worker.set_decode_tokens_per_second(1'234);
  return worker;
}

v1::GetClusterResponse ThreeWorkers() {
  v1::GetClusterResponse cluster;
  cluster.set_model("demo");
  cluster.set_dtype("bfloat16");
  cluster.set_max_model_len(2048);
  cluster.set_running_requests(12);
  *cluster.add_workers() = WorkerOf("decode-0", "decode", "ready");
  *cluster.add_workers() = WorkerOf("prefill-0", "prefill", "ready");
  *cluster.add_workers() = WorkerOf("prefill-1", "prefill", "draining");
  return cluster;
}

TEST(StatusText, At120ColumnsWithAddresses) {
  EXPECT_EQ(StatusText(ThreeWorkers(), nullptr, {.width = 120}),
            "demo (bfloat16), longest sequence 2,048 tokens\n"
            "12 running, 0 queued, 1,234 tok/s\n"
            "prefill 1, decode 1\n"
            "\n"
            "worker     role     state     running  waiting  KV used  cached  tok/s     up         "
            " address\n"
            "decode-0   decode   ready          12        0     12 %    30 %  1,234  2m14s  "
            "127.0.0.1:43211\n"
            "prefill-0  prefill  ready          12        0     12 %    30 %  5,432  2m14s  "
            "127.0.0.1:43211\n"
            "prefill-1  prefill  draining       12        0     12 %    30 %  5,432  2m14s  "
            "127.0.0.1:43211\n");
}

TEST(StatusText, At80ColumnsWithout) {
  const std::string text = StatusText(ThreeWorkers(), nullptr, {.width = 80});
  EXPECT_LE(WidestLine(text), 80u) << text;
  EXPECT_THAT(text, AllOf(HasSubstr("decode-0"), HasSubstr("KV used"), HasSubstr("tok/s"),
                          Not(HasSubstr("43211"))));
}

TEST(StatusText, WideHasEverything) {
  EXPECT_THAT(StatusText(ThreeWorkers(), nullptr, {.width = 80, .wide = true}),
              AllOf(HasSubstr("43211"), HasSubstr("43212"), HasSubstr("1,000")));
  // A pipe is given all columns but those of --wide.
  EXPECT_THAT(StatusText(ThreeWorkers(), nullptr, {}),
              AllOf(HasSubstr("43211"), Not(HasSubstr("43212"))));
}

TEST(StatusText, RolesThatAreShortOfTheirNumber) {
  const nlohmann::json up = {
      {"wanted", {{"prefill", 1}, {"decode", 3}}},
      {"workers",
       {{"decode-0", {{"role", "decode"}, {"state", "runs"}}},
        {"decode-1", {{"role", "decode"}, {"state", "ended (exit code 1), starting it again"}}},
        {"decode-2", {{"role", "decode"}, {"state", "runs"}}},
        {"prefill-0", {{"role", "prefill"}, {"state", "runs"}}}}}};
  EXPECT_THAT(StatusText(ThreeWorkers(), up, {.width = 80}),
              AllOf(HasSubstr("prefill 1, decode 1 of 3\n"),
                    testing::EndsWith("decode-1: ended (exit code 1), starting it again\n"
                                      "decode-2: joining\n")));
}

TEST(StatusText, NobodyThere) {
  v1::GetClusterResponse empty;
  empty.set_model("demo");
  EXPECT_THAT(StatusText(empty, nullptr, {.width = 80}), HasSubstr("no workers have joined"));
  EXPECT_THAT(StatusText(empty, {{"wanted", {{"unified", 2}}}}, {.width = 80}),
              HasSubstr("unified 0 of 2\n"));
}

}  // namespace
}  // namespace tandem::cli
