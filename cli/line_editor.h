// Lines typed at a terminal: editing, history, pasted text of any length, several lines.
//
// Over libedit (docs/adr/008). While one lives, the terminal is its own: between two reads keys are
// not echoed and wait for the next one, so that typing does not mix with what is printed.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace tandem::cli {

class LineEditor {
 public:
  enum class Outcome {
    kLine,
    kInterrupted,  // Ctrl-C
    kEndOfInput,   // Ctrl-D at an empty line, or the terminal is gone
  };
  struct Line {
    Outcome outcome;
    std::string text;  // UTF-8, what had been typed; without the newline that ended it, but it may
                       // hold others
  };

  // stdin and stdout are terminals.
  LineEditor();
  // Gives the terminal back as it was.
  ~LineEditor();
  LineEditor(const LineEditor&) = delete;
  LineEditor& operator=(const LineEditor&) = delete;

  // One thread at a time, as AddHistory. `prompt` is ASCII.
  Line Read(std::string_view prompt);
  // What the arrow keys bring back, latest first.
  void AddHistory(const std::string& text);

  // From any thread. Interrupts the Read that is running, if any.
  void Interrupt();
  // From any thread, where the process ends without the destructor.
  void GiveTerminalBack();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::cli
