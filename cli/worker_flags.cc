#include "cli/worker_flags.h"

#include "nlohmann/json.hpp"

#include "common/base/nearest_name.h"
#include "common/base/status.h"

namespace tandem::cli {

absl::StatusOr<FlagNames> ParseFlagList(const std::string& json) {
  const nlohmann::json list = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!list.is_object() || !list.contains("flags") || !list["flags"].is_array()) {
    return InvalidArgument("not a list of flags: '{}'", json.substr(0, 80));
  }
  FlagNames names;
  for (const nlohmann::json& flag : list["flags"]) {
    const std::string name = flag.is_object() ? flag.value("name", "") : "";
    if (!name.starts_with("--")) return InvalidArgument("not a flag: {}", flag.dump());
    names.insert(name);
    if (flag.value("boolean", false)) names.insert("--no-" + name.substr(2));
  }
  return names;
}

absl::StatusOr<std::map<std::string, std::vector<std::string>>> DistributeFlags(
    const std::vector<std::string>& arguments, const std::map<std::string, FlagNames>& known,
    const std::map<std::string, std::string>& managed, const std::vector<std::string>& own) {
  std::map<std::string, std::vector<std::string>> out;
  for (size_t i = 0; i < arguments.size();) {
    if (!arguments[i].starts_with("--")) {
      return InvalidArgument("unexpected argument '{}'", arguments[i]);
    }
    const std::string name = arguments[i].substr(0, arguments[i].find('='));
    if (const auto found = managed.find(name); found != managed.end()) {
      return InvalidArgument("{} is set by tandem up itself; {}", name, found->second);
    }
    size_t end = i + 1;
    while (end < arguments.size() && !arguments[end].starts_with("--")) ++end;
    bool taken = false;
    for (const auto& [program, names] : known) {
      if (names.count(name) == 0) continue;
      taken = true;
      std::vector<std::string>& given = out[program];
      given.insert(given.end(), arguments.begin() + static_cast<std::ptrdiff_t>(i),
                   arguments.begin() + static_cast<std::ptrdiff_t>(end));
    }
    if (!taken) {
      FlagNames all(own.begin(), own.end());
      for (const auto& [program, names] : known) all.insert(names.begin(), names.end());
      for (const auto& [flag, instead] : managed) all.erase(flag);
      const std::vector<std::string> candidates(all.begin(), all.end());
      const auto nearest = NearestName(name, candidates);
      return InvalidArgument("unknown flag {}{}", name,
                             nearest ? fmt::format("; did you mean {}?", *nearest)
                                     : "; tandem up --help lists all flags");
    }
    i = end;
  }
  return out;
}

}  // namespace tandem::cli
