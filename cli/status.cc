// `tandem status`: the workers of a running cluster.
#include "common/base/status.h"

#include <csignal>
#include <cstdio>
#include <unistd.h>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "cli/cluster_admin_client.h"
#include "cli/command.h"
#include "cli/control_socket.h"
#include "cli/status_text.h"
#include "cli/terminal.h"
#include "cli/units.h"

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
          {"decode_tokens_per_second", worker.decode_tokens_per_second()},
          {"max_num_seqs", worker.max_num_seqs()},
          {"uptime_seconds", worker.uptime_seconds()}};
}

// What `tandem up` wants is "wanted", by role, where one says it.
void PrintJson(const v1::GetClusterResponse& cluster, const nlohmann::json& up) {
  nlohmann::ordered_json out = {{"model", cluster.model()},
                                {"capability", cluster.capability()},
                                {"dtype", cluster.dtype()},
                                {"block_size", cluster.block_size()},
                                {"max_model_len", cluster.max_model_len()},
                                {"queued_requests", cluster.queued_requests()},
                                {"running_requests", cluster.running_requests()},
                                {"workers", nlohmann::ordered_json::array()}};
  for (const v1::Worker& worker : cluster.workers()) out["workers"].push_back(WorkerJson(worker));
  if (up.is_object() && up.contains("wanted")) out["wanted"] = up["wanted"];
  fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

struct StatusFlags {
  AdminTarget target;
  bool json = false;
  bool wide = false;
  double watch_s = 0;
};

// Of a terminal what fits; everything into a pipe.
StatusOptions TextOptions(const StatusFlags& flags) {
  StatusOptions options;
  options.wide = flags.wide;
  if (IsTerminal(STDOUT_FILENO)) options.width = static_cast<size_t>(TerminalWidth(STDOUT_FILENO));
  return options;
}

absl::Status Show(const StatusFlags& flags) {
  TANDEM_ASSIGN_OR_RETURN(const ClusterAdminClient client, FindCluster(flags.target));
  TANDEM_ASSIGN_OR_RETURN(const v1::GetClusterResponse cluster, client.GetCluster(kTimeout));
  // Not of a cluster that was started by hand.
  nlohmann::json up;
  if (flags.target.internal.empty()) {
    if (auto answer = AskUp(flags.target.server, {{"command", "get"}}); answer.ok()) up = *answer;
  }
  if (flags.json) {
    PrintJson(cluster, up);
  } else {
    fmt::print("{}", StatusText(cluster, up, TextOptions(flags)));
  }
  return absl::OkStatus();
}

// The terminal has shown the key.
void EraseCtrlC(int signal) {
  [[maybe_unused]] const ssize_t written = write(STDOUT_FILENO, kEraseLine, sizeof(kEraseLine) - 1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

// Until the process is ended. A router that is gone for a moment is waited for.
[[noreturn]] void Watch(const StatusFlags& flags) {
  const bool clear = IsTerminal(STDOUT_FILENO) && !flags.json;
  if (clear) std::signal(SIGINT, EraseCtrlC);
  while (true) {
    if (clear) fmt::print("\033[H\033[2J");
    std::fflush(stdout);  // or it would wipe away what goes to stderr
    const absl::Status status = Show(flags);
    if (!status.ok()) Fail("status", status, flags.target.server);
    if (clear) fmt::print("\nevery {}; Ctrl-C ends\n", TimeText(absl::Seconds(flags.watch_s)));
    std::fflush(stdout);
    absl::SleepFor(absl::Seconds(flags.watch_s));
  }
}

// --watch may stand alone: then every 2 s.
Arguments WithWatchPeriod(Arguments arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    double ignored = 0;
    const bool period = i + 1 < arguments.size() && absl::SimpleAtod(arguments[i + 1], &ignored);
    if (arguments[i] == "--watch" && !period) arguments[i] = "--watch=2";
  }
  return arguments;
}

}  // namespace

int RunStatus(const Arguments& arguments) {
  FlagSet parser(
      "tandem status",
      "Shows the workers of a running cluster. tok/s: what a prefill worker can compute, "
      "what a decode worker draws now.");
  StatusFlags flags;
  AddAdminFlags(&parser, &flags.target);
  parser.Add("--json", &flags.json, "one JSON object instead of a table");
  parser.Add("--wide", &flags.wide, "all columns, however narrow the terminal");
  parser.Add("--watch", &flags.watch_s, "show it again and again; alone: every 2 s", "s");
  if (const auto exit_code = ParseOrExit(&parser, WithWatchPeriod(arguments))) return *exit_code;
  if (flags.watch_s != 0 && !(flags.watch_s >= 0.1 && flags.watch_s <= 3600)) {
    fmt::print(stderr, "tandem status: --watch must be 0.1 to 3600 s, got {}\n", flags.watch_s);
    return kExitUsage;
  }
  if (flags.watch_s > 0) Watch(flags);
  const absl::Status status = Show(flags);
  return status.ok() ? kExitOk : Fail("status", status, flags.target.server);
}

}  // namespace tandem::cli
