#include "cli/up_plan.h"

#include <algorithm>
#include <cstdlib>
#include <sched.h>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "fmt/format.h"

#include "cli/metrics_targets.h"
#include "cli/program_flags.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

// Of a GPU's memory, for all workers on it together.
constexpr double kGpuMemoryUtilization = 0.9;

int NumCores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace

Machine ThisMachine() {
  return {.cores = NumCores(),
          .gpus = CountGpus("/dev", std::getenv("CUDA_VISIBLE_DEVICES")),
          .memory = ReadHostMemory(),
          .shared_huge_pages = SharedMemoryHasHugePages()};
}

absl::StatusOr<std::unique_ptr<UpPlan>> UpPlan::Make(const UpFlags& flags,
                                                     const std::vector<FlagTable>& programs,
                                                     const Machine& machine) {
  std::unique_ptr<UpPlan> plan(new UpPlan(flags));
  TANDEM_RETURN_IF_ERROR(plan->Settle(programs, machine));
  return plan;
}

absl::Status UpPlan::Settle(const std::vector<FlagTable>& programs, const Machine& machine) {
  given_ = DistributeFlags(flags_.forwarded, programs);
  start_ = {.model_dir = flags_.model, .workers = WorkerNames()};
  start_.threads = std::max(1, machine.cores / static_cast<int>(start_.workers.size()));
  for (const char* program : {kPrefillProgram, kDecodeProgram}) {
    // First, so that a --num-threads of the user comes later and wins.
    std::vector<std::string>& given = given_[program];
    given.insert(given.begin(), fmt::format("--num-threads={}", start_.threads));
  }
  PlaceWorkers(machine.gpus);
  start_.flags = given_[kDecodeProgram];
  start_.on_cpu = places_.empty();
  TANDEM_ASSIGN_OR_RETURN(checked_, Check(machine));
  if (!checked_.plan) return absl::OkStatus();
  if (start_.share_weights && !machine.shared_huge_pages) {
    checked_.warnings.emplace_back(
        "the weights that workers share lie in pages of 4 KiB, which makes steps up to a fourth "
        "slower; cure: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
  }
  GiveMemory(*checked_.plan);
  return absl::OkStatus();
}

// Also settles whether weights are shared: where that costs no speed, or where it must be.
absl::StatusOr<CheckedStart> UpPlan::Check(const Machine& machine) {
  const bool may = !weights_.path().empty() && Ranks() == 1;
  if (start_.on_cpu && flags_.share_weights == "on" && Ranks() > 1) {
    return InvalidArgument(
        "--share-weights=on: the weights of a model that is split over ranks are not shared "
        "(--tensor-parallel-size={}): leave one of the two out",
        Ranks());
  }
  const bool automatic = flags_.share_weights == "auto";
  start_.share_weights =
      may && (flags_.share_weights == "on" || (automatic && machine.shared_huge_pages));
  absl::StatusOr<CheckedStart> checked = CheckStart(start_, machine.memory);
  if (!absl::IsResourceExhausted(checked.status()) || !automatic || !may) return checked;
  StartRequest shared = start_;
  shared.share_weights = true;
  absl::StatusOr<CheckedStart> fits = CheckStart(shared, machine.memory);
  if (!fits.ok()) return checked;
  start_ = std::move(shared);
  return fits;
}

std::vector<std::string> UpPlan::WorkerNames() const {
  std::vector<std::string> names;
  const auto add = [&names](const char* role, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) names.push_back(fmt::format("{}-{}", role, i));
  };
  add("prefill", *flags_.prefill);
  add("decode", *flags_.decode);
  add("unified", flags_.unified);
  return names;
}

// Workers start at once and cannot see what the others are about to take.
void UpPlan::GiveMemory(const StartPlan& plan) {
  for (const char* program : {kPrefillProgram, kDecodeProgram}) {
    std::vector<std::string>& given = given_[program];
    if (checked_.inputs.kv_bytes == 0) {
      given.push_back(fmt::format("--kv-cache-memory-bytes={}", plan.kv_pool));
    }
    if (start_.share_weights) given.push_back("--shared-weights=" + weights_.path());
  }
}

int UpPlan::Ranks() const {
  int ranks = 1;
  for (const std::string& argument : given_.at(kDecodeProgram)) {
    absl::string_view value = argument;
    if (absl::ConsumePrefix(&value, "--tensor-parallel-size="))
      (void)absl::SimpleAtoi(value, &ranks);
  }
  return std::max(1, ranks);
}

// As many GPUs each as a model has ranks, in turn; workers that share some share their memory,
// unless the user said how much.
void UpPlan::PlaceWorkers(int gpus) {
  const std::vector<std::string>& given = given_[kDecodeProgram];
  const auto says = [&given](const std::string& start) {
    return std::any_of(given.begin(), given.end(), [&start](const std::string& argument) {
      return argument.starts_with(start);
    });
  };
  if (says("--device=cpu")) return;
  places_ = PlaceOnGpus(static_cast<int>(start_.workers.size()), gpus,
                        says("--devices=") ? gpus : Ranks());
  shares_memory_ = !says("--gpu-memory-utilization=") && !says("--kv-cache-memory-bytes=");
}

std::vector<std::string> UpPlan::CommandLine(const std::string& program,
                                             std::vector<std::string> more) const {
  std::vector<std::string> out = {ProgramPath(program), "--model", flags_.model};
  out.insert(out.end(), more.begin(), more.end());
  if (flags_.metrics_insecure) out.emplace_back("--metrics-insecure");
  if (const auto given = given_.find(program); given != given_.end()) {
    out.insert(out.end(), given->second.begin(), given->second.end());
  }
  return out;
}

std::vector<std::string> UpPlan::Router(const std::string& listen,
                                        const std::string& internal_listen,
                                        const std::string& metrics_listen) const {
  return CommandLine(kRouterProgram, {"--listen", listen, "--internal-listen", internal_listen,
                                      "--metrics-listen", metrics_listen});
}

absl::StatusOr<std::vector<std::string>> UpPlan::Worker(const std::string& name,
                                                        const std::string& role, int place,
                                                        const std::string& router) const {
  std::vector<std::string> more = {
      "--router",
      router,
      "--worker-id",
      name,
      "--report-loading",
      "--metrics-listen",
      MetricsListen(MetricsHost(flags_), flags_.metrics_port, 1 + place),
  };
  if (role == "unified") more.emplace_back("--role=unified");
  if (!places_.empty()) {
    if (static_cast<size_t>(place) >= places_.size()) {
      return ResourceExhausted(
          "all {} places on GPUs are taken; start `tandem up` with more workers", places_.size());
    }
    const GpuPlace& on = places_[static_cast<size_t>(place)];
    more.push_back(fmt::format("--gpu={}", on.gpu));
    if (shares_memory_ && on.memory_share < 1) {
      more.push_back(
          fmt::format("--gpu-memory-utilization={:.4f}", kGpuMemoryUtilization * on.memory_share));
    }
  }
  return CommandLine(role == "prefill" ? kPrefillProgram : kDecodeProgram, std::move(more));
}

absl::Status UpPlan::CheckWorkers(int workers, const HostMemory& memory) const {
  if (!checked_.plan) return absl::OkStatus();
  StartInputs inputs = checked_.inputs;
  inputs.kv_bytes = static_cast<int64_t>(checked_.plan->kv_pool);
  inputs.workers = workers;
  inputs.memory = memory;
  return CheckMoreWorkers(inputs);
}

}  // namespace tandem::cli
