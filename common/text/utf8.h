// UTF-8 as the text code needs it: strict validation, walking text known to be valid, and the lossy
// reading of bytes that Unicode recommends ("maximal subparts" become one U+FFFD each; what Rust's
// from_utf8_lossy and Python's errors="replace" do).
//
// Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tandem {

// U+FFFD, what an invalid byte sequence is shown as.
inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

enum class Utf8Kind {
  kValid,       // `length` bytes are one well-formed character
  kInvalid,     // `length` bytes are a maximal subpart: one U+FFFD
  kIncomplete,  // the text ends inside a character that more bytes could still complete
};

struct Utf8Step {
  Utf8Kind kind;
  size_t length;
};

// What stands at the front of `bytes`, which must not be empty.
Utf8Step ClassifyUtf8(std::string_view bytes);

// Offset of the first byte that is not part of well-formed UTF-8 (surrogates, overlong forms and
// values above U+10FFFF are not), or nullopt when all of it is.
std::optional<size_t> FindInvalidUtf8(std::string_view bytes);

// Appends the lossy reading of `bytes` to `out`. With `final` false it stops before an incomplete
// character at the end. Returns how many bytes it read.
size_t AppendLossyUtf8(std::string_view bytes, bool final, std::string* out);

// The character at `text[*pos]`, advancing *pos behind it. `text` must be valid UTF-8 and *pos a
// character's start.
inline uint32_t NextCodePoint(std::string_view text, size_t* pos) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data()) + *pos;
  if (p[0] < 0x80) {
    *pos += 1;
    return p[0];
  }
  if (p[0] < 0xE0) {
    *pos += 2;
    return (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu);
  }
  if (p[0] < 0xF0) {
    *pos += 3;
    return (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
  }
  *pos += 4;
  return (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

// Appends one Unicode scalar value.
void AppendCodePoint(uint32_t code_point, std::string* out);

}  // namespace tandem
