// `tandem drain`, `tandem undrain` and `tandem scale`: which workers serve.
#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/cluster_admin_client.h"
#include "cli/command.h"
#include "cli/confirm.h"
#include "cli/control_socket.h"
#include "cli/units.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kCallTimeout = absl::Seconds(10);
constexpr absl::Duration kPollPeriod = absl::Milliseconds(100);

const v1::Worker* FindWorker(const v1::GetClusterResponse& cluster, const std::string& id) {
  for (const v1::Worker& worker : cluster.workers()) {
    if (worker.worker_id() == id) return &worker;
  }
  return nullptr;
}

int64_t CountReady(const v1::GetClusterResponse& cluster, const std::string& role) {
  return std::count_if(cluster.workers().begin(), cluster.workers().end(),
                       [&role](const v1::Worker& worker) {
                         return worker.role() == role && worker.state() == "ready";
                       });
}

// "" unless no worker of its role would be left.
std::string WarningOfLast(const v1::GetClusterResponse& cluster, const v1::Worker& leaving) {
  const int64_t others = CountReady(cluster, leaving.role()) - (leaving.state() == "ready" ? 1 : 0);
  if (others > 0) return "";
  return fmt::format("{} is the last {} worker that is ready: requests will fail without it",
                     leaving.worker_id(), leaving.role());
}

// Asks the router until `done` holds. Losing it for a moment is no error.
template <typename Condition>
absl::Status WaitUntil(const ClusterAdminClient& client, double timeout_s, Condition done) {
  const absl::Time end = absl::Now() + absl::Seconds(timeout_s);
  while (true) {
    const auto cluster = client.GetCluster(kCallTimeout);
    if (cluster.ok() && done(*cluster)) return absl::OkStatus();
    if (absl::Now() > end) {
      return cluster.ok() ? DeadlineExceeded("not done within --timeout {}",
                                             TimeText(absl::Seconds(timeout_s)))
                          : cluster.status();
    }
    absl::SleepFor(kPollPeriod);
  }
}

// The `tandem up` that the target names, asked.
absl::StatusOr<nlohmann::json> AskUpOf(const AdminTarget& target, const std::string& what,
                                       const nlohmann::json& request) {
  if (!target.internal.empty()) {
    return FailedPrecondition(
        "{} needs the `tandem up` that runs the cluster, on its machine: "
        "--server names it, without --internal",
        what);
  }
  return AskUp(target.server, request);
}

struct DrainFlags {
  AdminTarget target;
  std::string worker_id;
  bool wait = false;
  bool stay = false;
  bool force = false;
  double timeout_s = 600;
};

absl::Status Drain(const DrainFlags& flags, const ClusterAdminClient& client) {
  if (flags.stay) {
    TANDEM_RETURN_IF_ERROR(
        AskUpOf(flags.target, "--stay", {{"command", "hold"}, {"worker", flags.worker_id}})
            .status());
  }
  TANDEM_RETURN_IF_ERROR(client.DrainWorker(flags.worker_id, kCallTimeout));
  fmt::print(
      "{} is draining{}\n", flags.worker_id,
      flags.stay ? fmt::format("; `tandem undrain {}` takes it in again", flags.worker_id) : "");
  std::fflush(stdout);
  if (!flags.wait) return absl::OkStatus();
  // One that is started again is there once more, and does not drain.
  TANDEM_RETURN_IF_ERROR(
      WaitUntil(client, flags.timeout_s, [&flags](const v1::GetClusterResponse& cluster) {
        const v1::Worker* worker = FindWorker(cluster, flags.worker_id);
        return worker == nullptr || worker->state() != "draining";
      }));
  fmt::print("{} has left\n", flags.worker_id);
  return absl::OkStatus();
}

}  // namespace

int RunDrain(const Arguments& arguments) {
  FlagSet parser("tandem drain",
                 "Lets a worker finish its requests and leave. Returns once it takes no new ones. "
                 "`tandem up` starts a worker that has left again, unless --stay says otherwise.");
  DrainFlags flags;
  AddAdminFlags(&parser, &flags.target);
  parser.AddPositional("WORKER_ID", &flags.worker_id, "as `tandem status` shows it", true);
  parser.Add("--wait", &flags.wait, "return once it has left");
  parser.Add("--stay", &flags.stay, "keep it out until `tandem undrain` (with `tandem up`)");
  parser.Add("--force", &flags.force, "ask nothing, even if it is the last of its role");
  parser.Add("--timeout", &flags.timeout_s, "longest --wait", "s");
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;

  const auto client = FindCluster(flags.target);
  if (!client.ok()) return Fail("drain", client.status());
  const auto cluster = client->GetCluster(kCallTimeout);
  if (!cluster.ok()) return Fail("drain", cluster.status(), flags.target.server);
  // Of one that is not there the router says who is.
  if (const v1::Worker* worker = FindWorker(*cluster, flags.worker_id)) {
    const std::string warning = WarningOfLast(*cluster, *worker);
    if (!warning.empty() && !Confirm("drain", warning, flags.force)) return kExitFailed;
  }
  const absl::Status status = Drain(flags, *client);
  return status.ok() ? kExitOk : Fail("drain", status, flags.target.server);
}

int RunUndrain(const Arguments& arguments) {
  FlagSet parser("tandem undrain",
                 "Takes a worker in again that `tandem drain --stay` has taken out.");
  AdminTarget target;
  std::string worker_id;
  AddAdminFlags(&parser, &target);
  parser.AddPositional("WORKER_ID", &worker_id, "as `tandem status` shows it", true);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;

  const auto answer = AskUpOf(target, "undrain", {{"command", "release"}, {"worker", worker_id}});
  if (!answer.ok()) return Fail("undrain", answer.status());
  fmt::print("{} is started again\n", worker_id);
  return kExitOk;
}

int RunScale(const Arguments& arguments) {
  FlagSet parser(
      "tandem scale",
      "Changes how many workers of a role `tandem up` runs: tandem scale decode=3. Those "
      "that leave finish their requests first.");
  AdminTarget target;
  std::string wish;
  bool wait = false;
  bool force = false;
  double timeout_s = 600;
  AddAdminFlags(&parser, &target);
  parser.AddPositional("ROLE=COUNT", &wish, "prefill, decode or unified, and how many", true);
  parser.Add("--wait", &wait, "return once they are ready, or have left");
  parser.Add("--force", &force, "ask nothing, even if none of the role would be left");
  parser.Add("--timeout", &timeout_s, "longest --wait", "s");
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;

  const size_t equals = wish.find('=');
  const std::string role = wish.substr(0, equals);
  uint32_t count = 0;
  if (equals == std::string::npos || !absl::SimpleAtoi(wish.substr(equals + 1), &count)) {
    fmt::print(stderr, "tandem scale: ROLE=COUNT must be like decode=3, got '{}'\n", wish);
    return kExitUsage;
  }
  const auto client = FindCluster(target);
  if (!client.ok()) return Fail("scale", client.status());
  if (count == 0 &&
      !Confirm("scale", fmt::format("no {} worker would be left: requests may fail", role),
               force)) {
    return kExitFailed;
  }
  const auto answer =
      AskUpOf(target, "scale", {{"command", "scale"}, {"role", role}, {"count", count}});
  if (!answer.ok()) return Fail("scale", answer.status());
  fmt::print("{}: {} wanted\n", role, count);
  std::fflush(stdout);
  if (!wait) return kExitOk;
  const absl::Status status =
      WaitUntil(*client, timeout_s, [&role, count](const v1::GetClusterResponse& cluster) {
        const auto there =
            std::count_if(cluster.workers().begin(), cluster.workers().end(),
                          [&role](const v1::Worker& worker) { return worker.role() == role; });
        return CountReady(cluster, role) == count && there == count;
      });
  if (!status.ok()) return Fail("scale", status, target.server);
  fmt::print("{}: {} ready\n", role, count);
  return kExitOk;
}

}  // namespace tandem::cli
