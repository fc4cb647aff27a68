#include "cli/terminal.h"

#include <cstdlib>
#include <string_view>
#include <sys/ioctl.h>
#include <unistd.h>

#include "fmt/format.h"

#include "common/base/wrap_words.h"

namespace tandem::cli {
namespace {

constexpr int kDefaultWidth = 80;

std::string_view Environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

// Of ECMA-48's "select graphic rendition".
int CodeOf(Colour colour) {
  switch (colour) {
    case Colour::kNone:
      return 0;
    case Colour::kDim:
      return 2;
    case Colour::kYellow:
      return 33;
    case Colour::kRed:
      return 31;
  }
  return 0;
}

}  // namespace

bool IsTerminal(int fd) { return isatty(fd) == 1; }

int TerminalWidth(int fd) {
  winsize size = {};
  return ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kDefaultWidth;
}

std::string WrappedFor(int fd, const std::string& text) {
  return IsTerminal(fd) ? WrapWords(text, static_cast<size_t>(TerminalWidth(fd)), 0) : text;
}

bool WantsColour(int fd) {
  return IsTerminal(fd) && Environment("NO_COLOR").empty() && Environment("TERM") != "dumb";
}

std::string Coloured(Colour colour, const std::string& text, bool wanted) {
  if (!wanted || colour == Colour::kNone) return text;
  return fmt::format("\033[{}m{}\033[0m", CodeOf(colour), text);
}

}  // namespace tandem::cli
