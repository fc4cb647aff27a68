#include "cli/program_flags.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <poll.h>
#include <system_error>

#include "fmt/ranges.h"

#include "cli/child_process.h"
#include "common/base/build_info.h"
#include "common/base/status.h"
#include "common/config/flags.h"

namespace tandem::cli {
namespace {

template <typename Options>
FlagTable TableOf(const char* program, const char* summary, void (*add)(FlagSet*, Options*)) {
  Options options;
  FlagSet flags(program, summary);
  add(&flags, &options);
  flags.AnswerVersion(VersionText(program));
  return flags.Table();
}

}  // namespace

std::string ProgramPath(const std::string& name) {
  std::error_code error;
  return (std::filesystem::read_symlink("/proc/self/exe", error).parent_path() / name).string();
}

std::vector<FlagTable> ServerFlagTables() {
  return {TableOf(kRouterProgram, router::kRouterSummary, router::AddRouterFlags),
          TableOf(kPrefillProgram, prefill::kPrefillSummary, prefill::AddWorkerFlags),
          TableOf(kDecodeProgram, decode::kDecodeSummary, decode::AddWorkerFlags)};
}

absl::StatusOr<std::vector<FlagTable>> AskForFlags(
    const std::vector<std::vector<std::string>>& commands) {
  std::vector<std::unique_ptr<ChildProcess>> children;
  for (std::vector<std::string> command : commands) {
    command.emplace_back("--list-flags");
    TANDEM_ASSIGN_OR_RETURN(children.emplace_back(), ChildProcess::Start(command, {}));
  }
  std::vector<FlagTable> tables;
  for (size_t i = 0; i < children.size(); ++i) {
    const std::string name = fmt::format("{} --list-flags", fmt::join(commands[i], " "));
    std::string list;
    for (pollfd out{.events = POLLIN}; (out.fd = children[i]->out().fd()) >= 0;) {
      poll(&out, 1, -1);
      for (const std::string& line : children[i]->out().ReadLines()) list += line;
    }
    const int status = children[i]->Wait();
    if (status != 0) return Internal("{}: {}", name, DescribeWaitStatus(status));
    absl::StatusOr<FlagTable> table = ParseTable(list);
    if (!table.ok()) return Internal("{}: {}", name, MessageOf(table.status()));
    tables.push_back(*std::move(table));
  }
  return tables;
}

std::map<std::string, std::vector<std::string>> DistributeFlags(
    const std::vector<std::string>& given, const std::vector<FlagTable>& programs) {
  std::map<std::string, std::vector<std::string>> out;
  for (const std::string& argument : given) {
    const std::string name = argument.substr(0, argument.find('='));
    for (const FlagTable& program : programs) {
      const bool has = std::any_of(program.flags.begin(), program.flags.end(),
                                   [&name](const FlagInfo& info) { return info.name == name; });
      if (has) out[program.program].push_back(argument);
    }
  }
  return out;
}

}  // namespace tandem::cli
