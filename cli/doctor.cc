// `tandem doctor`: how KV blocks travel between the workers of a cluster, or would on this machine.
#include "absl/time/time.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "cli/cluster_admin_client.h"
#include "cli/command.h"
#include "cli/doctor_text.h"
#include "cli/host_facts.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);

void PrintJson(const nlohmann::ordered_json& json) {
  fmt::print("{}\n", json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

absl::StatusOr<v1::GetClusterResponse> AskCluster(const AdminTarget& target) {
  TANDEM_ASSIGN_OR_RETURN(const ClusterAdminClient client, FindCluster(target));
  return client.GetCluster(kTimeout);
}

}  // namespace

int RunDoctor(const Arguments& arguments) {
  FlagSet flags("tandem doctor",
                "With --server: the links between the workers of a running cluster, as their "
                "self-tests found them, and why none is better. Without: this machine, and which "
                "transport its workers would use between each two memories. Exit code 1: a link "
                "is refused, or nobody answers.");
  AdminTarget target;
  flags.Add("--server", &target.server, "the router's address; empty: this machine", "HOST:PORT");
  flags.SetEnvironment("--server", "TANDEM_SERVER");
  AddInternalFlag(&flags, &target);
  bool json = false;
  flags.Add("--json", &json, "one JSON object instead of text");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;
  if (target.server.empty() && target.internal.empty()) {
    const HostFacts facts = ReadHostFacts();
    if (json) {
      PrintJson(HostJson(facts));
    } else {
      fmt::print("{}", HostText(facts));
    }
    return kExitOk;
  }
  const auto cluster = AskCluster(target);
  if (!cluster.ok()) return Fail("doctor", cluster.status(), target.server);
  if (json) {
    PrintJson(LinksJson(*cluster));
  } else {
    fmt::print("{}", LinksText(*cluster));
  }
  return LinksWork(*cluster) ? kExitOk : kExitFailed;
}

}  // namespace tandem::cli
