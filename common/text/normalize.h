// Makes trivially different prompts equal, so that they share a cached prefix
// (--normalize-prompts).
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tandem {

// In this order: line ends CR LF and CR become LF; blanks (space and tab only) before a line end or
// the end of the text are removed; the text is brought to Unicode NFC (see nfc.h). Doing it twice
// changes nothing more. Nothing else is touched: not leading blanks, empty lines, other white
// space, or letter case. InvalidArgument naming the byte if `text` is not UTF-8.
//
// Removing a blank at the end of a prompt changes what a model completes it with, which is one
// reason why this is an option.
absl::StatusOr<std::string> NormalizePrompt(std::string_view text);

}  // namespace tandem
