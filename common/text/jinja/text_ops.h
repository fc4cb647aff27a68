// Python's operations on strings, for texts that remember who wrote them. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/text/jinja/value.h"

namespace tandem::jinja {

// str.strip, lstrip and rstrip; empty `chars`: Python's white space.
Text Strip(const Text& text, std::string_view chars, bool left, bool right);
// str.split: at `separator`, or at runs of white space if it is empty; at most `limit` times, < 0:
// any number. `from_right`: str.rsplit.
std::vector<Text> Split(const Text& text, std::string_view separator, int64_t limit,
                        bool from_right);
// str.replace, at most `limit` times, < 0: any number. Stops replacing beyond kMaxTextBytes.
Text Replace(const Text& text, std::string_view from, const Text& to, int64_t limit);
// ASCII letters only; other letters stay.
Text Upper(const Text& text);
Text Lower(const Text& text);
Text Capitalize(const Text& text);
Text Title(const Text& text);

// Offsets of the characters, and the size behind them.
std::vector<size_t> CharacterOffsets(std::string_view text);
// The characters, one text each.
std::vector<Text> Characters(const Text& text);

}  // namespace tandem::jinja
