#include "cli/up_screen.h"

#include <string_view>
#include <unistd.h>

#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/log_line.h"
#include "common/base/wrap_words.h"

namespace tandem::cli {
namespace {

constexpr size_t kIndent = 4;  // of a long line's further ones

Colour ColourOf(LineKind kind) {
  switch (kind) {
    case LineKind::kWarning:
      return Colour::kYellow;
    case LineKind::kError:
      return Colour::kRed;
    case LineKind::kRoutine:
    case LineKind::kBare:
      return Colour::kNone;
  }
  return Colour::kNone;
}

std::string_view LevelOf(Colour colour) {
  switch (colour) {
    case Colour::kRed:
      return "error";
    case Colour::kYellow:
      return "warn";
    case Colour::kDim:
    case Colour::kNone:
      return "info";
  }
  return "info";
}

}  // namespace

UpScreen::Options UpScreen::OfStderr(LogFormat format) {
  if (format == LogFormat::kJson) return {.out = stderr, .json = true};
  return {.out = stderr,
          .terminal = IsTerminal(STDERR_FILENO),
          .colour = WantsColour(STDERR_FILENO),
          .width = TerminalWidth(STDERR_FILENO)};
}

void UpScreen::Child(const std::string& name, const std::string& line) {
  const LineKind kind = KindOf(line);
  if (options_.json && kind == LineKind::kBare && !muted_) {
    return Print(LogLine(LogFormat::kJson, absl::Now(), "info", name, line));
  }
  if (muted_ || (options_.terminal && quiet_ && kind == LineKind::kRoutine)) return;
  // A line of the log says itself whose it is, and JSON stays JSON.
  const std::string shown = kind == LineKind::kBare ? fmt::format("{} | {}", name, line) : line;
  Line(shown, ColourOf(kind));
}

void UpScreen::Say(const std::string& text, Colour colour) {
  if (options_.json) {
    return Print(LogLine(LogFormat::kJson, absl::Now(), LevelOf(colour), "up", text));
  }
  Line("tandem up: " + text, colour);
}

void UpScreen::Line(const std::string& line, Colour colour) {
  const auto width = static_cast<size_t>(options_.width);
  const std::string shown =
      options_.terminal && line.size() > width ? WrapWords(line, width, kIndent) : line;
  Print(Coloured(colour, shown, options_.colour) + "\n");
}

void UpScreen::Print(const std::string& text) {
  if (!bar_.empty()) fmt::print(options_.out, "{}", kEraseLine);
  fmt::print(options_.out, "{}{}", text, bar_);
  std::fflush(options_.out);
}

void UpScreen::SetBar(const std::string& text) {
  if (!options_.terminal || text == bar_) return;
  fmt::print(options_.out, "{}{}", kEraseLine, text);
  std::fflush(options_.out);
  bar_ = text;
}

}  // namespace tandem::cli
