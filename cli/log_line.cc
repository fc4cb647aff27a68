#include "cli/log_line.h"

#include <map>
#include <sstream>
#include <string_view>

#include "nlohmann/json.hpp"

namespace tandem::cli {
namespace {

LineKind KindOfLevel(const std::string& word) {
  static const std::map<std::string_view, LineKind> kLevels = {{"debug", LineKind::kRoutine},
                                                               {"info", LineKind::kRoutine},
                                                               {"warn", LineKind::kWarning},
                                                               {"error", LineKind::kError}};
  const auto found = kLevels.find(word);
  return found == kLevels.end() ? LineKind::kBare : found->second;
}

struct Entry {
  LineKind kind = LineKind::kBare;
  std::string message;
};

// "2026-11-28T22:54:02.123Z error decode-0: out of blocks"
Entry SplitText(const std::string& line) {
  std::istringstream in(line);
  std::string time, level, process;
  if (!(in >> time >> level >> process) || !time.ends_with('Z') || !process.ends_with(':')) {
    return {};
  }
  Entry out{KindOfLevel(level), ""};
  std::getline(in >> std::ws, out.message);
  return out;
}

nlohmann::json Parse(const std::string& line) {
  return nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
}

std::string Member(const nlohmann::json& object, const char* name) {
  if (!object.is_object()) return "";
  const auto found = object.find(name);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

LineKind KindOf(const std::string& line) {
  if (line.starts_with('{')) return KindOfLevel(Member(Parse(line), "level"));
  return SplitText(line).kind;
}

std::string TextOf(const std::string& line) {
  if (line.starts_with('{')) {
    const std::string message = Member(Parse(line), "message");
    return message.empty() ? line : message;
  }
  const Entry entry = SplitText(line);
  return entry.kind == LineKind::kBare ? line : entry.message;
}

}  // namespace tandem::cli
