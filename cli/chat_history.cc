#include "cli/chat_history.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include "fmt/format.h"

#include "common/base/file.h"
#include "common/text/utf8.h"

namespace tandem::cli {
namespace {

// One message, one line: its newlines are written \n, and a backslash \\.
std::string Escape(std::string_view message) {
  std::string out;
  for (const char c : message) {
    if (c == '\n') {
      out += "\\n";
    } else {
      if (c == '\\') out += c;
      out += c;
    }
  }
  return out;
}

std::string Unescape(std::string_view line) {
  std::string out;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\\' && i + 1 < line.size()) {
      out += line[++i] == 'n' ? '\n' : line[i];
    } else {
      out += line[i];
    }
  }
  return out;
}

void WriteTo(const std::string& path, int flags, const std::string& text) {
  const int fd = open(path.c_str(), flags | O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return;
  [[maybe_unused]] const ssize_t n = write(fd, text.data(), text.size());
  close(fd);
}

}  // namespace

std::string ChatHistory::DefaultPath() {
  const char* state = std::getenv("XDG_STATE_HOME");
  if (state != nullptr && *state == '/') return fmt::format("{}/tandem/chat_history", state);
  const char* home = std::getenv("HOME");
  if (home == nullptr || *home != '/') return "";
  return fmt::format("{}/.local/state/tandem/chat_history", home);
}

std::vector<std::string> ChatHistory::Load() const {
  std::vector<std::string> messages;
  if (path_.empty()) return messages;
  const auto text = ReadFile(path_);
  if (!text.ok()) return messages;
  std::vector<std::string_view> lines;
  for (size_t begin = 0; begin < text->size();) {
    const size_t end = std::min(text->find('\n', begin), text->size());
    lines.push_back(std::string_view(*text).substr(begin, end - begin));
    begin = end + 1;
  }
  const bool cut = lines.size() > 2 * kMaxMessages;
  if (lines.size() > kMaxMessages) lines.erase(lines.begin(), lines.end() - kMaxMessages);
  std::string rest;
  for (const std::string_view line : lines) {
    rest.append(line).append("\n");
    if (!FindInvalidUtf8(line).has_value()) messages.push_back(Unescape(line));
  }
  if (cut) {
    const std::string fresh = fmt::format("{}.{}", path_, getpid());
    WriteTo(fresh, O_TRUNC, rest);
    std::rename(fresh.c_str(), path_.c_str());
  }
  return messages;
}

void ChatHistory::Append(std::string_view message) const {
  if (path_.empty() || message.size() > kMaxBytes) return;
  const std::filesystem::path directory = std::filesystem::path(path_).parent_path();
  std::error_code ignored;
  std::filesystem::create_directories(directory.parent_path(), ignored);
  mkdir(directory.c_str(), 0700);
  WriteTo(path_, O_APPEND, Escape(message) + "\n");
}

}  // namespace tandem::cli
