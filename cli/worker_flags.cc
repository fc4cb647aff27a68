#include "cli/worker_flags.h"

#include <sstream>

#include "common/base/nearest_name.h"
#include "common/base/status.h"

namespace tandem {

FlagNames FlagsInHelp(const std::string& help) {
  FlagNames names;
  std::istringstream lines(help);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("  --")) continue;
    std::istringstream words(line);
    for (std::string word; words >> word && word.starts_with("--");) {
      const bool more = word.ends_with(',');
      if (more) word.pop_back();
      names.insert(word);
      if (!more) break;
    }
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

}  // namespace tandem
