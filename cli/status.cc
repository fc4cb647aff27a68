// `tandem status`: the workers of a running cluster.
#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "cli/cluster_admin_client.h"
#include "cli/command.h"
#include "cli/table.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);

nlohmann::ordered_json WorkerJson(const v1::Worker& worker) {
  return {{"worker_id", worker.worker_id()},
          {"role", worker.role()},
          {"state", worker.state()},
          {"address", worker.address()},
          {"metrics_address", worker.metrics_address()},
          {"running", worker.running()},
          {"waiting", worker.waiting()},
          {"waiting_tokens", worker.waiting_tokens()},
          {"blocks_total", worker.blocks_total()},
          {"blocks_free", worker.blocks_free()},
          {"blocks_cached", worker.blocks_cached()},
          {"blocks_used", worker.blocks_used()},
          {"blocks_quarantined", worker.blocks_quarantined()},
          {"seconds_since_report", worker.seconds_since_report()},
          {"prefill_tokens_per_second", worker.prefill_tokens_per_second()},
          {"uptime_seconds", worker.uptime_seconds()}};
}

void PrintJson(const v1::GetClusterResponse& cluster) {
  nlohmann::ordered_json out = {{"model", cluster.model()},
                                {"capability", cluster.capability()},
                                {"max_model_len", cluster.max_model_len()},
                                {"queued_requests", cluster.queued_requests()},
                                {"running_requests", cluster.running_requests()},
                                {"workers", nlohmann::ordered_json::array()}};
  for (const v1::Worker& worker : cluster.workers()) out["workers"].push_back(WorkerJson(worker));
  fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

void PrintTable(const v1::GetClusterResponse& cluster) {
  fmt::print("model {} ({}), max_model_len {}\nrequests: {} running, {} queued\n", cluster.model(),
             cluster.capability(), cluster.max_model_len(), cluster.running_requests(),
             cluster.queued_requests());
  std::vector<std::vector<std::string>> rows = {
      {"worker", "role", "state", "running", "waiting", "waiting tokens", "blocks used", "cached",
       "free", "total", "prefill tok/s", "up (s)", "address", "metrics"}};
  for (const v1::Worker& worker : cluster.workers()) {
    rows.push_back({worker.worker_id(), worker.role(), worker.state(),
                    std::to_string(worker.running()), std::to_string(worker.waiting()),
                    std::to_string(worker.waiting_tokens()), std::to_string(worker.blocks_used()),
                    std::to_string(worker.blocks_cached()), std::to_string(worker.blocks_free()),
                    std::to_string(worker.blocks_total()),
                    worker.prefill_tokens_per_second() > 0
                        ? fmt::format("{:.0f}", worker.prefill_tokens_per_second())
                        : "-",
                    fmt::format("{:.0f}", worker.uptime_seconds()), worker.address(),
                    worker.metrics_address()});
  }
  if (cluster.workers().empty()) {
    fmt::print("no workers have joined\n");
  } else {
    fmt::print("{}", RenderTable(rows));
  }
}

}  // namespace

int RunStatus(const Arguments& arguments) {
  FlagSet flags("tandem status", "Shows the workers of a running cluster.");
  AdminTarget target;
  bool json = false;
  AddAdminFlags(&flags, &target);
  flags.Add("--json", &json, "one JSON object instead of a table");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;

  const auto client = FindCluster(target);
  if (!client.ok()) return Fail("status", client.status());
  const auto cluster = client->GetCluster(kTimeout);
  if (!cluster.ok()) return Fail("status", cluster.status(), target.server);
  if (json) {
    PrintJson(*cluster);
  } else {
    PrintTable(*cluster);
  }
  return kExitOk;
}

}  // namespace tandem::cli
