// Finds added tokens ("<|im_end|>", "<tool_call>", ...) in text, as Hugging Face does.
//
// Immutable and thread-safe after construction. At each position the longest token counts, the
// leftmost match goes first and matches do not overlap. single_word drops a match that touches a
// word character; lstrip and rstrip let a match swallow the white space beside it.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/text/text_map.h"

namespace tandem {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
};

struct AddedTokenMatch {
  size_t begin;
  size_t end;  // the white space that the token swallows included
  int32_t id;
};

// Byte range [first, second) of a text.
using TextRange = std::pair<size_t, size_t>;

class AddedTokenMatcher {
 public:
  // Looks for the contents of `tokens` as they are given (the caller normalises those of normalized
  // tokens). Empty contents are ignored.
  explicit AddedTokenMatcher(const std::vector<AddedToken>& tokens);

  bool empty() const { return patterns_.empty(); }

  // Matches in `text` whose token lies wholly inside one of `ranges` (ascending, disjoint); white
  // space is swallowed and word characters are looked for in all of `text`.
  std::vector<AddedTokenMatch> Find(std::string_view text, std::span<const TextRange> ranges) const;

 private:
  struct Flags {
    int32_t id;
    bool single_word;
    bool lstrip;
    bool rstrip;
  };

  // The longest token at `text[pos..end)`, or nullptr; `length` gets its length.
  const Flags* LongestAt(std::string_view text, size_t pos, size_t end, size_t* length) const;

  TextMap<Flags> patterns_;
  std::array<std::vector<size_t>, 256>
      lengths_;  // by first byte: the lengths of tokens, longest first
};

}  // namespace tandem
