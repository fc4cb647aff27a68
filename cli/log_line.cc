#include "cli/log_line.h"

#include <map>
#include <sstream>
#include <string_view>

#include "nlohmann/json.hpp"

namespace tandem::cli {
namespace {

// Of one word, or of the value of "level".
LineKind KindOfLevel(const std::string& word) {
  static const std::map<std::string_view, LineKind> kLevels = {
      {"trace", LineKind::kRoutine},   {"debug", LineKind::kRoutine},
      {"info", LineKind::kRoutine},    {"T", LineKind::kRoutine},
      {"D", LineKind::kRoutine},       {"I", LineKind::kRoutine},
      {"warning", LineKind::kWarning}, {"warn", LineKind::kWarning},
      {"W", LineKind::kWarning},       {"error", LineKind::kError},
      {"E", LineKind::kError},         {"critical", LineKind::kError},
      {"C", LineKind::kError}};
  const auto found = kLevels.find(word);
  return found == kLevels.end() ? LineKind::kBare : found->second;
}

// A line of text, from its level on: "error decode-0: out of blocks" or "decode-0 error ...".
struct Words {
  LineKind kind = LineKind::kBare;
  std::string rest;  // behind the level
};

Words SplitText(const std::string& line) {
  // A log line begins with its time.
  if (line.empty() || line[0] < '0' || line[0] > '9') return {};
  constexpr int kWords = 4;  // date, time, level and name, in some order
  std::istringstream in(line);
  std::string word;
  for (int i = 0; i < kWords && in >> word; ++i) {
    const LineKind kind = KindOfLevel(word);
    if (kind == LineKind::kBare) continue;
    Words out{kind, ""};
    std::getline(in >> std::ws, out.rest);
    return out;
  }
  return {};
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
  const Words words = SplitText(line);
  if (words.kind == LineKind::kBare) return line;
  // The name of the process, if it stands there.
  const size_t space = words.rest.find(' ');
  const bool named = space != std::string::npos && space > 0 && words.rest[space - 1] == ':';
  return named ? words.rest.substr(space + 1) : words.rest;
}

}  // namespace tandem::cli
