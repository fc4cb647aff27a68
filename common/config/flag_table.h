// What a program says about its flags: the source of its help, of what `tandem up` hands on to it,
// of the answer to --list-flags (from which shell completion and docs/flags.md are made) and of
// nothing else that could differ from it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem {

// What can be checked of a value without knowing the flag.
enum class ValueKind {
  kText,
  kInteger,
  kNatural,  // a non-negative integer
  kNumber,
  kBytes,  // as ParseBytes reads them
};

struct FlagInfo {
  std::string name;   // with its dashes; a positional argument has none
  std::string group;  // heading in the help
  std::string unit;
  std::string default_text;
  std::string environment;  // variable that sets it; "" for none
  std::string help;
  std::vector<std::string> choices;
  ValueKind kind = ValueKind::kText;
  bool boolean = false;   // takes --no-name too
  bool required = false;  // positional arguments only
  bool foreign = false;   // handed on to another program
};

struct FlagTable {
  std::string program;
  std::string description;
  std::vector<FlagInfo> positionals;
  std::vector<FlagInfo> flags;
  std::vector<std::string> examples;  // whole commands; "# why" after one is shown as it stands
};

// The group of --help, --config and --version, shown last.
inline constexpr std::string_view kGeneralGroup = "General";

std::string TableJson(const FlagTable& table);
// InvalidArgument: what came is no answer to --list-flags.
absl::StatusOr<FlagTable> ParseTable(const std::string& json);

// Help for people, no line longer than `width` where words allow. `wanted` is "" for the program's
// own flags, "all" for the foreign ones too, else a group's name or part of flags' names.
std::string HelpText(const FlagTable& table, const std::string& wanted, int width);

}  // namespace tandem
