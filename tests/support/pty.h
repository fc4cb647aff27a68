// A program on a terminal of its own, as a person sees and types it: keys go in, the screen is what
// comes out. Every wait has a bound.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

namespace tandem {

// What a terminal shows: enough of ECMA-48 for line editors and progress lines. A character is as
// wide as wcwidth says in UTF-8; the right half of a wide one is an empty cell.
class Screen {
 public:
  Screen(int columns, int rows);

  // Bytes that a program wrote; a character or sequence may be spread over several calls.
  void Write(const std::string& bytes);
  // Row `row`, without blanks at its end.
  std::string Line(int row) const;
  // All rows that were shown, those that scrolled away too; no empty ones at the end. Rows that a
  // character too many broke are joined, as a terminal's selection joins them.
  std::string Text() const;
  int cursor_row() const { return row_; }
  int cursor_column() const { return column_; }
  // Sequences that it does not know, for the test to complain about.
  const std::vector<std::string>& unknown() const { return unknown_; }
  bool bracketed_paste() const { return bracketed_paste_; }

 private:
  struct Row {
    std::vector<std::string> cells;
    bool wraps = false;  // goes on in the next one
  };

  Row Blank() const;
  void Put(const std::string& character);
  void NewLine();
  void Control(char c);
  // `final` ends CSI `parameters`.
  void Csi(const std::string& parameters, char final);
  void Erase(int row, int from, int to);
  std::string Join(const Row& row) const;

  const int columns_, rows_;
  std::vector<Row> grid_;
  std::vector<Row> scrolled_;
  int row_ = 0, column_ = 0;
  bool wrap_next_ = false;  // the last column is full: the next character begins a row
  bool bracketed_paste_ = false;
  std::string pending_;  // the beginning of a character or sequence
  std::vector<std::string> unknown_;
};

// Not thread-safe. The destructor kills (SIGKILL) and reaps.
class PtyProcess {
 public:
  // TERM is xterm-256color; `env` as for Process::Spawn, after the inherited one.
  PtyProcess(const std::vector<std::string>& args, const std::vector<std::string>& env = {},
             int columns = 80, int rows = 24);
  ~PtyProcess();
  PtyProcess(const PtyProcess&) = delete;
  PtyProcess& operator=(const PtyProcess&) = delete;

  // Keys; reads what the program writes meanwhile, so that neither waits for the other.
  void Type(const std::string& keys);
  // Reads until `condition` holds of the screen; false after `seconds` or at the program's end.
  bool WaitUntil(const std::function<bool(const Screen&)>& condition, double seconds);
  // Until all that was shown contains `text`.
  bool WaitFor(const std::string& text, double seconds);
  // Until it contains it `count` times.
  bool WaitFor(const std::string& text, int count, double seconds);
  // Exit code, or 128 + signal; nullopt if it still runs after `seconds`.
  std::optional<int> Wait(double seconds);
  void Signal(int signal);
  const Screen& screen() const { return screen_; }
  // True where the terminal echoes and collects lines, as a shell left it.
  bool IsCooked() const;

 private:
  // Reads what is there, waiting up to `seconds` for the first byte; false: nothing came.
  bool Read(double seconds);

  pid_t pid_ = -1;
  int master_ = -1;
  Screen screen_;
  std::optional<int> exit_code_;
};

}  // namespace tandem
