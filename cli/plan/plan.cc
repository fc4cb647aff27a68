// `tandem plan`: says before anything runs how to split some cards between prompts and answers.
#include <cstdio>
#include <string>
#include <unistd.h>

#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "cli/command.h"
#include "cli/plan/plan_flags.h"
#include "cli/plan/plan_report.h"
#include "common/base/status.h"

namespace tandem::cli {

int RunPlan(const Arguments& arguments) {
  FlagSet parser("tandem plan",
                 "Simulates every split of some cards under a traffic, and says which one to run.");
  PlanFlags flags;
  flags.AddTo(&parser);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (const absl::Status status = flags.Check(); !status.ok()) {
    fmt::print(stderr, "tandem plan: {}\n", MessageOf(status));
    return kExitUsage;
  }
  const absl::StatusOr<PlanTask> task = MakeTask(flags);
  if (!task.ok()) return Fail("plan", task.status());
  spdlog::set_level(spdlog::level::err);  // what simulated workers log is of no interest
  PlanProgress progress;
  const bool shown = flags.progress && isatty(STDERR_FILENO) == 1;
  if (shown) {
    progress = [](const std::string& text) {
      fmt::print(stderr, "\r\x1b[K{}", text);
      std::fflush(stderr);
    };
  }
  const PlanResult result = FindBestSplit(*task, progress);
  if (shown) fmt::print(stderr, "\r\x1b[K");
  if (flags.json) {
    fmt::print("{}\n", PlanJson(*task, result).dump());
  } else {
    fmt::print("{}", RenderPlan(*task, result));
  }
  return kExitOk;
}

}  // namespace tandem::cli
