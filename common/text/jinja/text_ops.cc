#include "common/text/jinja/text_ops.h"

#include <algorithm>
#include <cctype>
#include <functional>

#include "common/text/utf8.h"

namespace tandem::jinja {
namespace {

// What str.isspace and str.strip of Python take for white space.
bool IsWhiteSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

std::vector<Text> SplitAtWhiteSpace(const Text& text) {
  std::vector<Text> parts;
  size_t begin = std::string_view::npos;
  for (size_t pos = 0; pos < text.size();) {
    const size_t at = pos;
    const bool white = IsWhiteSpace(NextCodePoint(text.chars(), &pos));
    if (white && begin != std::string_view::npos) {
      parts.push_back(text.Sub(begin, at));
      begin = std::string_view::npos;
    } else if (!white && begin == std::string_view::npos) {
      begin = at;
    }
  }
  if (begin != std::string_view::npos) parts.push_back(text.Sub(begin, text.size()));
  return parts;
}

Text Map(const Text& text, const std::function<char(size_t, char)>& change) {
  std::string chars(text.chars());
  for (size_t i = 0; i < chars.size(); ++i) chars[i] = change(i, chars[i]);
  return text.WithChars(std::move(chars));
}

char ToUpper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; }
char ToLower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

}  // namespace

std::vector<size_t> CharacterOffsets(std::string_view text) {
  std::vector<size_t> offsets;
  for (size_t pos = 0; pos < text.size(); NextCodePoint(text, &pos)) offsets.push_back(pos);
  offsets.push_back(text.size());
  return offsets;
}

std::vector<Text> Characters(const Text& text) {
  const std::vector<size_t> offsets = CharacterOffsets(text.chars());
  std::vector<Text> characters;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    characters.push_back(text.Sub(offsets[i], offsets[i + 1]));
  }
  return characters;
}

Text Strip(const Text& text, std::string_view chars, bool left, bool right) {
  const std::vector<size_t> offsets = CharacterOffsets(text.chars());
  std::vector<uint32_t> wanted;
  for (size_t pos = 0; pos < chars.size();) wanted.push_back(NextCodePoint(chars, &pos));
  const auto stripped = [&](size_t index) {
    size_t pos = offsets[index];
    const uint32_t c = NextCodePoint(text.chars(), &pos);
    return chars.empty() ? IsWhiteSpace(c)
                         : std::find(wanted.begin(), wanted.end(), c) != wanted.end();
  };
  size_t begin = 0, end = offsets.size() - 1;
  while (left && begin < end && stripped(begin)) ++begin;
  while (right && begin < end && stripped(end - 1)) --end;
  return text.Sub(offsets[begin], offsets[end]);
}

std::vector<Text> Split(const Text& text, std::string_view separator, int64_t limit,
                        bool from_right) {
  if (separator.empty()) return SplitAtWhiteSpace(text);
  const std::string_view chars = text.chars();
  std::vector<Text> parts;
  size_t begin = 0, end = chars.size();
  for (; limit != 0; --limit) {
    const std::string_view rest = chars.substr(begin, end - begin);
    const size_t at = from_right ? rest.rfind(separator) : rest.find(separator);
    if (at == std::string_view::npos) break;
    if (from_right) {
      parts.push_back(text.Sub(begin + at + separator.size(), end));
      end = begin + at;
    } else {
      parts.push_back(text.Sub(begin, begin + at));
      begin += at + separator.size();
    }
  }
  parts.push_back(text.Sub(begin, end));
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

Text Replace(const Text& text, std::string_view from, const Text& to, int64_t limit) {
  if (from.empty()) return text;
  Text result;
  bool first = true;
  for (const Text& part : Split(text, from, limit, false)) {
    if (result.size() > kMaxTextBytes) break;
    if (!first) result.Append(to);
    first = false;
    result.Append(part);
  }
  return result;
}

Text Upper(const Text& text) {
  return Map(text, [](size_t, char c) { return ToUpper(c); });
}
Text Lower(const Text& text) {
  return Map(text, [](size_t, char c) { return ToLower(c); });
}
Text Capitalize(const Text& text) {
  return Map(text, [](size_t i, char c) { return i == 0 ? ToUpper(c) : ToLower(c); });
}
Text Title(const Text& text) {
  bool in_word = false;
  return Map(text, [&in_word](size_t, char c) {
    const char changed = in_word ? ToLower(c) : ToUpper(c);
    in_word = std::isalpha(static_cast<unsigned char>(c)) != 0;
    return changed;
  });
}

}  // namespace tandem::jinja
