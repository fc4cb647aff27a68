// The flags of the programs beside this one, and who takes which of those given to `tandem up`.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/config/flag_table.h"
#include "decode_worker/worker_flags.h"
#include "prefill_worker/worker_flags.h"
#include "router/router_flags.h"

namespace tandem::cli {

using decode::kDecodeProgram;
using prefill::kPrefillProgram;
using router::kRouterProgram;

// The program of that name beside this one.
std::string ProgramPath(const std::string& name);

// Those of the router, the prefill and the decode worker. They are linked in: to start three
// programs that say them takes longer than all else that `tandem up` does before it starts the
// router.
std::vector<FlagTable> ServerFlagTables();

// What each of these commands (a program and its arguments) answers to --list-flags. They are asked
// at the same time. Error: one cannot be run or answers something else.
absl::StatusOr<std::vector<FlagTable>> AskForFlags(
    const std::vector<std::vector<std::string>>& commands);

// Gives every flag of `given` ("--name=value", see FlagSet::AddForeign) to all programs that have
// it.
std::map<std::string, std::vector<std::string>> DistributeFlags(
    const std::vector<std::string>& given, const std::vector<FlagTable>& programs);

}  // namespace tandem::cli
