// What `tandem up` asks before it starts anything: is the model whole, are the flags right, does it
// all fit into memory?
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "cli/model_check.h"
#include "cli/start_plan.h"

namespace tandem::cli {

struct StartRequest {
  std::string model_dir;
  std::vector<std::string> flags;    // of the workers, as they will be given: --a=1 or --a 1
  std::vector<std::string> workers;  // their names
  int threads = 1;                   // of each
  bool share_weights = true;
  bool on_cpu = true;  // else nothing is said of memory: each worker looks at its own card
};

struct CheckedStart {
  CheckedModel model;
  StartInputs inputs;
  std::optional<StartPlan> plan;      // of workers on the CPU
  std::vector<std::string> warnings;  // of the model's and the plan's, each once
};

// INVALID_ARGUMENT names the flag or file, RESOURCE_EXHAUSTED says what does not fit and what
// would.
absl::StatusOr<CheckedStart> CheckStart(const StartRequest& request, const HostMemory& memory);

// For --dry-run.
std::string CheckedStartText(const StartRequest& request, const CheckedStart& start);

}  // namespace tandem::cli
