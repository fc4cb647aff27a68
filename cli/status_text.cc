#include "cli/status_text.h"

#include <algorithm>
#include <map>
#include <vector>

#include "fmt/format.h"

#include "cli/table.h"
#include "cli/units.h"

namespace tandem::cli {
namespace {

// Every column, with the flag that it is shown with --wide only.
struct Column {
  const char* name;
  bool wide;
  std::string (*cell)(const v1::Worker& worker);
};

// Prompt tokens of a worker that prefills, as fast as it can; else those drawn now.
std::string RateCell(const v1::Worker& worker) {
  const double rate = worker.role() == "prefill" ? worker.prefill_tokens_per_second()
                                                 : worker.decode_tokens_per_second();
  return rate > 0 ? CountText(static_cast<uint64_t>(rate + 0.5)) : "-";
}

const std::vector<Column>& Columns() {
  static const std::vector<Column> columns = {
      {"worker", false, [](const v1::Worker& w) { return w.worker_id(); }},
      {"role", false, [](const v1::Worker& w) { return w.role(); }},
      {"state", false, [](const v1::Worker& w) { return w.state(); }},
      {"running", false, [](const v1::Worker& w) { return CountText(w.running()); }},
      {"waiting", false, [](const v1::Worker& w) { return CountText(w.waiting()); }},
      {"waiting tokens", true, [](const v1::Worker& w) { return CountText(w.waiting_tokens()); }},
      {"KV used", false,
       [](const v1::Worker& w) {
         return ShareText(w.blocks_used() + w.blocks_quarantined(), w.blocks_total());
       }},
      {"cached", false,
       [](const v1::Worker& w) { return ShareText(w.blocks_cached(), w.blocks_total()); }},
      {"blocks", true, [](const v1::Worker& w) { return CountText(w.blocks_total()); }},
      {"free", true, [](const v1::Worker& w) { return CountText(w.blocks_free()); }},
      {"tok/s", false, RateCell},
      {"up", false,
       [](const v1::Worker& w) { return TimeText(absl::Seconds(w.uptime_seconds())); }},
      {"address", false, [](const v1::Worker& w) { return w.address(); }},
      {"metrics", true, [](const v1::Worker& w) { return w.metrics_address(); }},
  };
  return columns;
}

std::string TableText(const v1::GetClusterResponse& cluster, const StatusOptions& options) {
  if (cluster.workers().empty()) return "no workers have joined\n";
  std::vector<std::vector<std::string>> rows(1);
  for (const Column& column : Columns()) {
    if (options.wide || !column.wide) rows[0].push_back(column.name);
  }
  for (const v1::Worker& worker : cluster.workers()) {
    rows.emplace_back();
    for (const Column& column : Columns()) {
      if (options.wide || !column.wide) rows.back().push_back(column.cell(worker));
    }
  }
  if (options.wide || options.width == 0) return RenderTable(rows);
  return RenderTable(rows, options.width, {"address", "role", "up", "cached", "waiting"});
}

// "prefill 2, decode 1 of 2".
std::string RolesLine(const v1::GetClusterResponse& cluster, const nlohmann::json& up) {
  std::string line;
  for (const char* role : {"prefill", "decode", "unified"}) {
    const auto ready = std::count_if(
        cluster.workers().begin(), cluster.workers().end(),
        [role](const v1::Worker& w) { return w.role() == role && w.state() == "ready"; });
    int64_t wanted = ready;
    if (up.is_object() && up.contains("wanted")) wanted = up["wanted"].value(role, int64_t{0});
    if (ready == 0 && wanted == 0) continue;
    line += fmt::format("{}{} {}", line.empty() ? "" : ", ", role, ready);
    if (ready < wanted) line += fmt::format(" of {}", wanted);
  }
  return line;
}

// Of workers that should be there and have not joined, a line each.
std::string AbsentText(const v1::GetClusterResponse& cluster, const nlohmann::json& up) {
  if (!up.is_object() || !up.contains("workers")) return "";
  std::string text;
  for (const auto& [name, worker] : up["workers"].items()) {
    const bool joined =
        std::any_of(cluster.workers().begin(), cluster.workers().end(),
                    [&name = name](const v1::Worker& w) { return w.worker_id() == name; });
    const std::string state = worker.value("state", "");
    // "runs": it listens, and is about to join.
    if (!joined) text += fmt::format("{}: {}\n", name, state == "runs" ? "joining" : state);
  }
  return text;
}

}  // namespace

std::string StatusText(const v1::GetClusterResponse& cluster, const nlohmann::json& up,
                       const StatusOptions& options) {
  double rate = 0;
  for (const v1::Worker& worker : cluster.workers()) rate += worker.decode_tokens_per_second();
  const std::string dtype = cluster.dtype().empty() ? "" : fmt::format(" ({})", cluster.dtype());
  std::string text = fmt::format(
      "{}{}, longest sequence {} tokens\n{} running, {} queued, {} tok/s\n", cluster.model(), dtype,
      CountText(cluster.max_model_len()), CountText(cluster.running_requests()),
      CountText(cluster.queued_requests()), CountText(static_cast<uint64_t>(rate + 0.5)));
  if (options.wide && !cluster.capability().empty()) text += cluster.capability() + "\n";
  if (const std::string roles = RolesLine(cluster, up); !roles.empty()) text += roles + "\n";
  return text + "\n" + TableText(cluster, options) + AbsentText(cluster, up);
}

}  // namespace tandem::cli
