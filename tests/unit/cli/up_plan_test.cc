#include "cli/up_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr size_t kMiB = size_t{1} << 20;

// Two prefill and two decode workers of the demo model.
class UpPlanTest : public testing::Test {
 protected:
  UpPlanTest() {
    flags_.model = SourcePath("models/demo");
    flags_.prefill = flags_.decode = 2;
    machine_ = {.cores = 8, .memory = {4096 * kMiB, 4096 * kMiB, "this machine"}};
    for (const char* program : {kRouterProgram, kPrefillProgram, kDecodeProgram}) {
      FlagTable table{.program = program};
      if (program != kRouterProgram) {
        table.flags = {{.name = "--num-threads"},
                       {.name = "--kv-cache-memory-bytes"},
                       {.name = "--tensor-parallel-size"},
                       {.name = "--devices"}};
      }
      programs_.push_back(table);
    }
  }

  std::unique_ptr<UpPlan> Plan() {
    auto plan = UpPlan::Make(flags_, programs_, machine_);
    EXPECT_OK(plan.status());
    return *std::move(plan);
  }
  static std::vector<std::string> Worker(const UpPlan& plan, const std::string& role, int place) {
    return plan.Worker(role + "-0", role, place, "127.0.0.1:7000").value();
  }

  UpFlags flags_;
  Machine machine_;
  std::vector<FlagTable> programs_;
};

TEST_F(UpPlanTest, EachWorkerGetsItsPartOfTheMachine) {
  const auto plan = Plan();
  for (const char* role : {"prefill", "decode"}) {
    EXPECT_THAT(
        Worker(*plan, role, 1),
        AllOf(Contains(std::string(role) + "-0"), Contains("127.0.0.1:7000"),
              Contains("--num-threads=2"), Contains(StartsWith("--kv-cache-memory-bytes="))));
  }
  EXPECT_THAT(plan->Router("127.0.0.1:8000", "127.0.0.1:0", "127.0.0.1:9090"),
              AllOf(Contains("127.0.0.1:8000"), Not(Contains(StartsWith("--num-threads")))));
}

TEST_F(UpPlanTest, MetricsLeaveThisMachineOnlyIfTheUserSaysSo) {
  flags_.host = "0.0.0.0";
  EXPECT_THAT(Worker(*Plan(), "decode", 0),
              AllOf(Contains("127.0.0.1:0"), Not(Contains("--metrics-insecure"))));
  flags_.metrics_insecure = true;
  flags_.metrics_port = 9090;
  const auto plan = Plan();
  EXPECT_THAT(Worker(*plan, "decode", 0),
              AllOf(Contains("0.0.0.0:9091"), Contains("--metrics-insecure")));
  EXPECT_THAT(plan->Router("0.0.0.0:8000", "127.0.0.1:0", "0.0.0.0:9090"),
              Contains("--metrics-insecure"));
}

TEST_F(UpPlanTest, WhatTheUserSaysOfWorkersComesLastAndWins) {
  flags_.forwarded = {"--num-threads=3", "--kv-cache-memory-bytes=64MiB"};
  std::vector<std::string> own;
  for (const std::string& argument : Worker(*Plan(), "decode", 0)) {
    if (argument.starts_with("--num-threads") || argument.starts_with("--kv-")) {
      own.push_back(argument);
    }
  }
  EXPECT_THAT(own,
              ElementsAre("--num-threads=2", "--num-threads=3", "--kv-cache-memory-bytes=64MiB"));
}

TEST_F(UpPlanTest, WorkersTakeTheGpusInTurnAndShareTheirMemory) {
  machine_.gpus = 3;
  const auto plan = Plan();
  EXPECT_THAT(Worker(*plan, "prefill", 1),
              AllOf(Contains("--gpu=1"), Not(Contains(StartsWith("--gpu-memory")))));
  EXPECT_THAT(Worker(*plan, "decode", 3),
              AllOf(Contains("--gpu=0"), Contains("--gpu-memory-utilization=0.4500")));
  EXPECT_EQ(plan->Worker("decode-2", "decode", 4, "127.0.0.1:7000").status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_OK(plan->CheckWorkers(100, {}));  // each worker asks its own card
}

TEST_F(UpPlanTest, AWorkerHasAGpuForEachRank) {
  machine_.gpus = 4;
  flags_.forwarded = {"--tensor-parallel-size=2"};
  EXPECT_THAT(Worker(*Plan(), "prefill", 1),
              AllOf(Contains("--gpu=2"), Contains("--tensor-parallel-size=2"),
                    Contains("--gpu-memory-utilization=0.4500")));
  // Who names them has all workers on the same ones.
  flags_.forwarded.emplace_back("--devices=0,0");
  EXPECT_THAT(Worker(*Plan(), "prefill", 1),
              AllOf(Contains("--gpu=0"), Contains("--gpu-memory-utilization=0.2250")));
}

TEST_F(UpPlanTest, WorkersThatAreSplitShareNoWeights) {
  machine_.shared_huge_pages = true;
  EXPECT_THAT(Worker(*Plan(), "decode", 0), Contains(StartsWith("--shared-weights=")));
  flags_.forwarded = {"--tensor-parallel-size=2"};
  const auto plan = Plan();
  EXPECT_THAT(Worker(*plan, "decode", 0), Not(Contains(StartsWith("--shared-weights="))));
  EXPECT_THAT(plan->Text(), Not(HasSubstr("one copy for all workers")));
  flags_.share_weights = "on";
  EXPECT_THAT(std::string(UpPlan::Make(flags_, programs_, machine_).status().message()),
              HasSubstr("--share-weights=on: the weights of a model that is split over ranks are "
                        "not shared (--tensor-parallel-size=2)"));
}

// `tandem scale` started whatever it was asked for.
TEST_F(UpPlanTest, MoreWorkersMustFitToo) {
  flags_.forwarded = {"--kv-cache-memory-bytes=512MiB"};
  const auto plan = Plan();
  EXPECT_OK(plan->CheckWorkers(6, machine_.memory));
  const absl::Status refused = plan->CheckWorkers(9, machine_.memory);
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()),
              AllOf(HasSubstr("9 workers in all do not fit"), HasSubstr("512 MiB"),
                    HasSubstr("4.0 GiB (this machine); 6 would fit")));
  // A pool that was chosen at the start is what every later worker gets too.
  flags_.forwarded.clear();
  const auto chosen = Plan();
  EXPECT_OK(chosen->CheckWorkers(4, machine_.memory));
  EXPECT_FALSE(chosen->CheckWorkers(4, {4096 * kMiB, 512 * kMiB, "this machine"}).ok());
}

}  // namespace
}  // namespace tandem::cli
