#include "common/config/flag_table.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "absl/strings/ascii.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "nlohmann/json.hpp"

#include "common/base/status.h"
#include "common/base/wrap_words.h"

namespace tandem {
namespace {

constexpr size_t kHelpColumn = 30;
constexpr size_t kMinTextWidth = 24;

constexpr std::array<const char*, 5> kKinds = {"text", "integer", "natural", "number", "bytes"};

// Those that are not known are texts: nothing is checked.
ValueKind KindNamed(const std::string& name) {
  const auto found = std::find(kKinds.begin(), kKinds.end(), name);
  return found == kKinds.end() ? ValueKind::kText
                               : static_cast<ValueKind>(std::distance(kKinds.begin(), found));
}

nlohmann::ordered_json InfoJson(const FlagInfo& info) {
  return {{"name", info.name},
          {"group", info.group},
          {"unit", info.unit},
          {"default", info.default_text},
          {"environment", info.environment},
          {"help", info.help},
          {"choices", info.choices},
          {"kind", kKinds.at(static_cast<size_t>(info.kind))},
          {"boolean", info.boolean},
          {"required", info.required},
          {"foreign", info.foreign}};
}

FlagInfo ParseInfo(const nlohmann::json& json) {
  FlagInfo info{.name = json.at("name").get<std::string>(),
                .group = json.value("group", ""),
                .unit = json.value("unit", ""),
                .default_text = json.value("default", ""),
                .environment = json.value("environment", ""),
                .help = json.value("help", ""),
                .kind = KindNamed(json.value("kind", "")),
                .boolean = json.value("boolean", false),
                .required = json.value("required", false),
                .foreign = json.value("foreign", false)};
  if (json.contains("choices")) info.choices = json["choices"].get<std::vector<std::string>>();
  return info;
}

std::string ShownName(const FlagInfo& info) {
  if (info.name == "--help") return "-h, --help[=GROUP|all]";
  return info.boolean ? "--[no-]" + info.name.substr(2) : info.name;
}

std::string DescribeFlag(const FlagInfo& info, size_t width) {
  std::string text = info.help;
  if (!info.choices.empty()) text += fmt::format(": {}", fmt::join(info.choices, ", "));
  std::vector<std::string> notes;
  if (!info.unit.empty()) notes.push_back(info.unit);
  if (info.required) notes.emplace_back("required");
  if (!info.default_text.empty()) notes.push_back("default " + info.default_text);
  if (!notes.empty()) text += fmt::format(" ({})", fmt::join(notes, "; "));
  const std::string left = "  " + ShownName(info);
  const std::string gap = left.size() + 2 <= kHelpColumn
                              ? std::string(kHelpColumn - left.size(), ' ')
                              : fmt::format("\n{:{}}", "", kHelpColumn);
  return left + gap +
         WrapWords(text, std::max(width, kHelpColumn + kMinTextWidth), kHelpColumn, kHelpColumn) +
         "\n";
}

// In order of first appearance, the general one last.
std::vector<std::string> Groups(const FlagTable& table) {
  std::vector<std::string> groups;
  for (const FlagInfo& info : table.flags) {
    if (std::find(groups.begin(), groups.end(), info.group) == groups.end()) {
      groups.push_back(info.group);
    }
  }
  std::stable_partition(groups.begin(), groups.end(),
                        [](const std::string& group) { return group != kGeneralGroup; });
  return groups;
}

std::string GroupText(const FlagTable& table, const std::string& group, size_t width) {
  std::string out;
  for (const FlagInfo& info : table.flags) {
    if (info.group == group) out += DescribeFlag(info, width);
  }
  const std::string title = group.empty() ? "Flags" : group;
  return out.empty() ? out : fmt::format("\n{}:\n{}", title, out);
}

std::string Usage(const FlagTable& table) {
  std::string usage = fmt::format("Usage: {} [flags]", table.program);
  for (const FlagInfo& info : table.positionals) {
    usage += info.required ? " " + info.name : " [" + info.name + "]";
  }
  return usage;
}

std::string PartText(const FlagTable& table, const std::string& wanted, size_t width) {
  const std::string word = absl::AsciiStrToLower(wanted);
  const std::vector<std::string> groups = Groups(table);
  for (const std::string& group : groups) {
    if (!group.empty() && absl::AsciiStrToLower(group) == word) {
      return GroupText(table, group, width).substr(1);
    }
  }
  std::string out;
  for (const FlagInfo& info : table.flags) {
    if (info.name.find(word) != std::string::npos) out += DescribeFlag(info, width);
  }
  if (!out.empty()) return out;
  return WrapWords(fmt::format("{}: no group and no flag is called '{}'; groups: {}", table.program,
                               wanted, fmt::join(groups, ", ")),
                   width, 0) +
         "\n";
}

}  // namespace

std::string TableJson(const FlagTable& table) {
  nlohmann::ordered_json positionals = nlohmann::ordered_json::array();
  nlohmann::ordered_json flags = nlohmann::ordered_json::array();
  for (const FlagInfo& info : table.positionals) positionals.push_back(InfoJson(info));
  for (const FlagInfo& info : table.flags) flags.push_back(InfoJson(info));
  const nlohmann::ordered_json out = {{"program", table.program},
                                      {"description", table.description},
                                      {"positionals", std::move(positionals)},
                                      {"flags", std::move(flags)},
                                      {"examples", table.examples}};
  return out.dump() + "\n";
}

absl::StatusOr<FlagTable> ParseTable(const std::string& json) {
  try {
    const nlohmann::json in = nlohmann::json::parse(json);
    FlagTable table{.program = in.at("program").get<std::string>(),
                    .description = in.value("description", "")};
    for (const nlohmann::json& flag : in.at("flags")) {
      table.flags.push_back(ParseInfo(flag));
      if (!table.flags.back().name.starts_with("--")) {
        return InvalidArgument("not a flag: {}", flag.dump());
      }
    }
    if (in.contains("positionals")) {
      for (const auto& argument : in["positionals"]) {
        table.positionals.push_back(ParseInfo(argument));
      }
    }
    if (in.contains("examples")) {
      table.examples = in["examples"].get<std::vector<std::string>>();
    }
    return table;
  } catch (const nlohmann::json::exception&) {
    return InvalidArgument("not a list of flags: '{}'", json.substr(0, 80));
  }
}

std::string HelpText(const FlagTable& whole, const std::string& wanted, int width) {
  const auto columns = static_cast<size_t>(std::max(width, 40));
  if (!wanted.empty() && wanted != "all") return PartText(whole, wanted, columns);
  FlagTable table = whole;
  if (wanted.empty()) std::erase_if(table.flags, [](const FlagInfo& info) { return info.foreign; });
  std::string out = WrapWords(table.description, columns, 0) + "\n\n" + Usage(table) + "\n";
  for (const FlagInfo& info : table.positionals) out += DescribeFlag(info, columns);
  for (const std::string& group : Groups(table)) out += GroupText(table, group, columns);
  if (table.flags.size() < whole.flags.size()) {
    out += "\n" +
           WrapWords(fmt::format("Flags of the programs that it starts are taken too: --help=all "
                                 "shows them, --help=GROUP those of one of {}.",
                                 fmt::join(Groups(whole), ", ")),
                     columns, 0) +
           "\n";
  }
  if (!table.examples.empty()) {
    out += "\nExamples:\n";
    for (const std::string& example : table.examples) out += "  " + example + "\n";
  }
  return out;
}

}  // namespace tandem
