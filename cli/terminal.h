// What is known of the terminal that a stream is shown on.
#pragma once

#include <string>

namespace tandem::cli {

// What a line on a terminal is replaced with.
inline constexpr char kEraseLine[] = "\r\033[K";

bool IsTerminal(int fd);
// Columns of the terminal at `fd`; 80 where it does not say. Not of a pipe: nothing is cut there.
int TerminalWidth(int fd);
// For the terminal at `fd` in lines that end between words; as it stands for anything else.
std::string WrappedFor(int fd, const std::string& text);
// Whether colours are welcome: a terminal that has them, and no NO_COLOR in the environment
// (no-color.org).
bool WantsColour(int fd);

enum class Colour { kNone, kDim, kYellow, kRed };
// `text` in that colour, where `wanted`.
std::string Coloured(Colour colour, const std::string& text, bool wanted);

}  // namespace tandem::cli
