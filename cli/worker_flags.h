// Flags of `tandem up` that are meant for the processes it starts: who takes which, and mistakes
// refused before anything starts. Pure functions.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

using FlagNames = std::set<std::string>;

// The flags in a program's answer to --list-flags (see FlagSet::Help), each boolean one also with
// its "--no-" form. Error: what came is no such answer.
absl::StatusOr<FlagNames> ParseFlagList(const std::string& json);

// Gives every flag of `arguments` (--name value, --name=value, --name, --no-name) to all programs
// of `known` that have it. InvalidArgument for one that no program has (with the nearest name) or
// that is in `managed` (what `tandem up` sets itself: name -> what to use instead), and for a value
// without a flag. `own` are further names to suggest.
absl::StatusOr<std::map<std::string, std::vector<std::string>>> DistributeFlags(
    const std::vector<std::string>& arguments, const std::map<std::string, FlagNames>& known,
    const std::map<std::string, std::string>& managed, const std::vector<std::string>& own);

}  // namespace tandem::cli
