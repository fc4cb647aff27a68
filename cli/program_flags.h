// The flags of the processes that `tandem up` starts, as they say them themselves, and who takes
// which of those given.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/config/flag_table.h"

namespace tandem::cli {

// The program of that name beside this one.
std::string ProgramPath(const std::string& name);

// What each of these commands (a program and its arguments) answers to --list-flags. They are asked
// at the same time. Error: one cannot be run or answers something else.
absl::StatusOr<std::vector<FlagTable>> AskForFlags(
    const std::vector<std::vector<std::string>>& commands);

// Gives every flag of `given` ("--name=value", see FlagSet::AddForeign) to all programs that have
// it.
std::map<std::string, std::vector<std::string>> DistributeFlags(
    const std::vector<std::string>& given, const std::vector<FlagTable>& programs);

}  // namespace tandem::cli
