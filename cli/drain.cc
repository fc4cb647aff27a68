// `tandem drain WORKER_ID`: lets a worker finish its requests and leave.
#include "fmt/format.h"

#include "cli/cluster_admin_client.h"
#include "cli/command.h"

namespace tandem::cli {

int RunDrain(const Arguments& arguments) {
  FlagSet flags("tandem drain",
                "Lets a worker finish its requests and leave. Returns once it takes no new ones.");
  AdminTarget target;
  std::string worker_id;
  AddAdminFlags(&flags, &target);
  flags.AddPositional("WORKER_ID", &worker_id, "as `tandem status` shows it", true);
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;

  const auto client = FindCluster(target);
  if (!client.ok()) return Fail("drain", client.status());
  const absl::Status status = client->DrainWorker(worker_id, absl::Seconds(10));
  if (!status.ok()) return Fail("drain", status, target.server);
  fmt::print("{} is draining\n", worker_id);
  return kExitOk;
}

}  // namespace tandem::cli
