// What `tandem up` shows on stderr: lines of its processes and its own. On a terminal with colours,
// a bar that stays below them, and without routine lines while nobody needs them; elsewhere every
// line as it comes. Where the processes log JSON, every line is an object, on a terminal too.
#pragma once

#include <cstdio>
#include <string>

#include "cli/terminal.h"
#include "common/base/log.h"

namespace tandem::cli {

// Not thread-safe.
class UpScreen {
 public:
  struct Options {
    std::FILE* out = stderr;
    bool terminal = false;
    bool colour = false;
    int width = 80;     // columns
    bool json = false;  // not with `terminal`
  };
  // As stderr is.
  static Options OfStderr(LogFormat format);

  explicit UpScreen(const Options& options) : options_(options) {}
  ~UpScreen() { SetBar(""); }
  UpScreen(const UpScreen&) = delete;
  UpScreen& operator=(const UpScreen&) = delete;

  bool terminal() const { return options_.terminal; }
  int width() const { return options_.width; }
  bool quiet() const { return quiet_; }

  // A line that the process `name` wrote; behind its name, unless it is one of the log.
  void Child(const std::string& name, const std::string& line);
  // "tandem up: text", or an entry of process "up", whose level goes with the colour.
  void Say(const std::string& text, Colour colour = Colour::kNone);
  // As it is, with its own newlines.
  void Print(const std::string& text);
  // On a terminal: lines of children that are neither warnings nor errors are left out.
  void SetQuiet(bool quiet) { quiet_ = quiet; }
  // No line of a child is shown any more.
  void MuteChildren() { muted_ = true; }
  // On a terminal: replaces the last line, which stays last; "" takes it away.
  void SetBar(const std::string& text);

 private:
  void Line(const std::string& line, Colour colour);

  const Options options_;
  bool quiet_ = false;
  bool muted_ = false;
  std::string bar_;
};

}  // namespace tandem::cli
