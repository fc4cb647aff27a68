#include "cli/reading_line.h"

#include <utility>

#include "fmt/format.h"

#include "cli/terminal.h"
#include "cli/units.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kQuiet = absl::Milliseconds(300);

}  // namespace

ReadingLine::Options ReadingLine::Of(std::FILE* out, std::string line_so_far) {
  const int fd = fileno(out);
  return {.out = out,
          .terminal = IsTerminal(fd),
          .colour = WantsColour(fd),
          .width = TerminalWidth(fd),
          .line_so_far = std::move(line_so_far)};
}

ReadingLine::ReadingLine(Options options, Clock* clock)
    : options_(std::move(options)), clock_(clock), shown_from_(clock->Now() + kQuiet) {}

void ReadingLine::Show(const v1::PromptProgress& progress) {
  if (!options_.terminal || clock_->Now() < shown_from_) return;
  const std::string text =
      fmt::format("reading the prompt: {} of {} tokens", CountText(progress.computed_tokens()),
                  CountText(progress.total_tokens()));
  if (options_.line_so_far.size() + text.size() >= static_cast<size_t>(options_.width)) return;
  fmt::print(options_.out, "{}{}{}", kEraseLine, options_.line_so_far,
             Coloured(Colour::kDim, text, options_.colour));
  std::fflush(options_.out);
  shown_ = true;
}

void ReadingLine::Clear() {
  if (!std::exchange(shown_, false)) return;
  fmt::print(options_.out, "{}{}", kEraseLine, options_.line_so_far);
  std::fflush(options_.out);
}

}  // namespace tandem::cli
