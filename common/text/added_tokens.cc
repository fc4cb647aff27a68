#include "common/text/added_tokens.h"

#include <algorithm>
#include <functional>
#include <utf8proc.h>

#include "common/text/new_characters.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

// The character that ends at `text[end]`; `*begin` gets its start. `end` > 0.
uint32_t PreviousCodePoint(std::string_view text, size_t end, size_t* begin) {
  size_t pos = end - 1;
  while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  *begin = pos;
  return NextCodePoint(text, &pos);
}

// \s of Rust's regular expressions: the property White_Space.
bool IsWhiteSpace(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D);
  if (c == 0x85) return true;
  const auto category = utf8proc_category(static_cast<int32_t>(c));
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}

// \w of Rust's regular expressions: Alphabetic, marks, decimal numbers, connector punctuation, join
// controls.
bool IsWordCharacter(uint32_t c) {
  if (c == 0x200C || c == 0x200D || IsNewWordCharacter(c)) return true;
  switch (utf8proc_category(static_cast<int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_SO:  // the circled and squared letters are Alphabetic
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
             (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
    default:
      return false;
  }
}

bool TouchesWord(std::string_view text, size_t begin, size_t end) {
  size_t pos = 0;
  if (begin > 0 && IsWordCharacter(PreviousCodePoint(text, begin, &pos))) return true;
  pos = end;
  return end < text.size() && IsWordCharacter(NextCodePoint(text, &pos));
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(const std::vector<AddedToken>& tokens) {
  for (const AddedToken& token : tokens) {
    if (token.content.empty()) continue;
    const Flags flags{token.id, token.single_word, token.lstrip, token.rstrip};
    if (!patterns_.emplace(token.content, flags).second) continue;
    auto& lengths = lengths_[static_cast<uint8_t>(token.content[0])];
    const auto place =
        std::lower_bound(lengths.begin(), lengths.end(), token.content.size(), std::greater<>());
    if (place == lengths.end() || *place != token.content.size()) {
      lengths.insert(place, token.content.size());
    }
  }
}

const AddedTokenMatcher::Flags* AddedTokenMatcher::LongestAt(std::string_view text, size_t pos,
                                                             size_t end, size_t* length) const {
  for (const size_t candidate : lengths_[static_cast<uint8_t>(text[pos])]) {
    if (candidate > end - pos) continue;
    const auto it = patterns_.find(text.substr(pos, candidate));
    if (it == patterns_.end()) continue;
    *length = candidate;
    return &it->second;
  }
  return nullptr;
}

std::vector<AddedTokenMatch> AddedTokenMatcher::Find(std::string_view text,
                                                     std::span<const TextRange> ranges) const {
  std::vector<AddedTokenMatch> matches;
  if (empty()) return matches;
  size_t taken = 0;  // text before this belongs to earlier matches
  for (const TextRange& range : ranges) {
    for (size_t pos = range.first; pos < range.second;) {
      size_t length = 0;
      const Flags* token = LongestAt(text, pos, range.second, &length);
      if (token == nullptr) {
        ++pos;
        continue;
      }
      size_t begin = pos;
      size_t end = pos + length;
      pos = end;
      if (token->single_word && TouchesWord(text, begin, end)) continue;
      while (token->lstrip && begin > taken) {
        size_t previous = 0;
        if (!IsWhiteSpace(PreviousCodePoint(text, begin, &previous))) break;
        begin = std::max(previous, taken);
      }
      while (token->rstrip && end < text.size()) {
        size_t next = end;
        if (!IsWhiteSpace(NextCodePoint(text, &next))) break;
        end = next;
      }
      begin = std::max(begin, taken);  // an earlier match may have swallowed into this one
      end = std::max(end, begin);
      matches.push_back({begin, end, token->id});
      taken = end;
    }
  }
  return matches;
}

}  // namespace tandem
