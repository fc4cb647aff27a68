// What was typed into `tandem chat`, kept across runs in a file that only this user can read.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tandem::cli {

// Thread-compatible. What cannot be read or written is not kept, in silence: a chat works without.
// Several chats may append at once.
class ChatHistory {
 public:
  static constexpr size_t kMaxMessages = 1000;
  // Longer ones are pasted, and better pasted again.
  static constexpr size_t kMaxBytes = 16 << 10;

  // `path` "": nothing is kept.
  explicit ChatHistory(std::string path) : path_(std::move(path)) {}
  // $XDG_STATE_HOME/tandem/chat_history, or below ~/.local/state; "" where there is no home.
  static std::string DefaultPath();

  // The last kMaxMessages, oldest first; the file is cut down to them when it has twice as many.
  std::vector<std::string> Load() const;
  void Append(std::string_view message) const;

 private:
  const std::string path_;
};

}  // namespace tandem::cli
