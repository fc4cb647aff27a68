// The regular expression with which a tokenizer cuts text into pieces before byte-pair encoding.
//
// Immutable and thread-safe. PCRE2 with JIT, UTF and UCP. Hugging Face runs the same pattern on
// Oniguruma, whose idea of \p{L}, \p{N} and \s differs for some ten thousand characters (a newer
// Unicode, and U+180E is no white space): where a text has such characters, the pattern is run on a
// copy of the text in which each is replaced by a character of the same UTF-8 length that PCRE2
// puts into the wanted class. Patterns that name one of those characters literally are not
// supported.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem {

class SplitPattern {
 public:
  // InvalidArgument, with the offset, if `regex` is no valid pattern, can match nothing, or is over
  // 4 KiB.
  static absl::StatusOr<SplitPattern> Compile(std::string_view regex);

  // Cuts `text` (valid UTF-8): each match is a piece, and so is what stands between matches.
  // Appends the end offset of each piece to `ends`; the last is text.size(). ResourceExhausted when
  // the pattern backtracks beyond all reason.
  absl::Status Split(std::string_view text, std::vector<size_t>* ends) const;

 private:
  struct Code;
  explicit SplitPattern(std::shared_ptr<const Code> code) : code_(std::move(code)) {}

  std::shared_ptr<const Code> code_;
};

}  // namespace tandem
