// What the processes of `tandem up` are given on their command lines, settled before any of them
// starts: who takes which of the user's flags, and each worker's part of the machine.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "cli/gpu_placement.h"
#include "cli/program_flags.h"
#include "cli/shared_memory.h"
#include "cli/start_check.h"
#include "cli/up_flags.h"
#include "common/base/host_memory.h"
#include "common/config/flag_table.h"

namespace tandem::cli {

// What there is for the workers to share.
struct Machine {
  int cores = 1;
  int gpus = 0;
  HostMemory memory;
  bool shared_huge_pages = false;  // in memory that processes share
};
// That on which this process runs.
Machine ThisMachine();

// Holds the memory that the workers share, so it lives as long as they do. Not thread-safe.
class UpPlan {
 public:
  // `flags` are complete. Checks model, flags and memory; errors are those of CheckStart.
  static absl::StatusOr<std::unique_ptr<UpPlan>> Make(const UpFlags& flags,
                                                      const std::vector<FlagTable>& programs,
                                                      const Machine& machine);

  const std::vector<std::string>& warnings() const { return checked_.warnings; }
  // For --dry-run.
  std::string Text() const { return CheckedStartText(start_, checked_); }

  // Command lines; listening addresses may have port 0.
  std::vector<std::string> Router(const std::string& listen, const std::string& internal_listen,
                                  const std::string& metrics_listen) const;
  // `place` is a number that no other worker has. RESOURCE_EXHAUSTED: no GPU has room for another.
  absl::StatusOr<std::vector<std::string>> Worker(const std::string& name, const std::string& role,
                                                  int place, const std::string& router) const;

  // RESOURCE_EXHAUSTED where so many workers do not fit into `memory`, of which those that run hold
  // a part and have yet to take what they were promised.
  absl::Status CheckWorkers(int workers, const HostMemory& memory) const;

 private:
  explicit UpPlan(const UpFlags& flags) : flags_(flags) {}

  absl::Status Settle(const std::vector<FlagTable>& programs, const Machine& machine);
  absl::StatusOr<CheckedStart> Check(const Machine& machine);
  int Ranks() const;  // of each worker's model
  void PlaceWorkers(int gpus);
  void GiveMemory(const StartPlan& plan);
  std::vector<std::string> WorkerNames() const;
  std::vector<std::string> CommandLine(const std::string& program,
                                       std::vector<std::string> more) const;

  const UpFlags flags_;
  std::map<std::string, std::vector<std::string>> given_;  // by program
  std::vector<GpuPlace> places_;                           // of the workers; empty: no GPU
  bool shares_memory_ = false;                             // nobody said what a worker may take
  StartRequest start_;
  CheckedStart checked_;
  const SharedMemory weights_{"tandem-weights"};  // of all workers, if they share them
};

}  // namespace tandem::cli
