#include "common/text/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "common/base/status.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr size_t kMaxPatternBytes = 4096;
// Backtracking allowed per call: a constant and a share per byte, as `\s*[\r\n]+` may give back a whole run of blanks.
constexpr uint64_t kMatchLimitBase = 10'000'000;
constexpr uint64_t kMatchLimitPerByte = 16;
constexpr uint32_t kHeapLimitKiB = 512 * 1024;

struct Range {
  uint32_t first;
  uint32_t last;
};

// Letters and numbers of Unicode 15 and 16 (Hugging Face's Oniguruma) that PCRE2 10.42 (Unicode 14) has not.
constexpr Range kNewLetters[] = {
    {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},   {0x105C0, 0x105F3},
    {0x10D4A, 0x10D65}, {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4}, {0x1123F, 0x11240},
    {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5},
    {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0},
    {0x11F02, 0x11F02}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}, {0x1342F, 0x1342F},
    {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C},
    {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1DF25, 0x1DF2A},
    {0x1E030, 0x1E06D}, {0x1E4D0, 0x1E4EB}, {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0},
    {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF},
};
constexpr Range kNewNumbers[] = {
    {0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9}, {0x11F50, 0x11F59},
    {0x16130, 0x16139}, {0x16D70, 0x16D79}, {0x1CCF0, 0x1CCF9}, {0x1D2C0, 0x1D2D3},
    {0x1E4F0, 0x1E4F9}, {0x1E5F1, 0x1E5FA},
};

template <size_t N>
bool Contains(const Range (&ranges)[N], uint32_t c) {
  const auto* range = std::lower_bound(std::begin(ranges), std::end(ranges), c,
                                       [](const Range& r, uint32_t v) { return r.last < v; });
  return range != std::end(ranges) && range->first <= c;
}

// The character to show PCRE2 in place of `c`; of the same length in UTF-8.
uint32_t StandIn(uint32_t c) {
  if (c == 0x180E) return 0x2060;  // a format character that is no white space
  if (Contains(kNewLetters, c)) return c < 0x10000 ? 0x4E00 : 0x20000;
  if (Contains(kNewNumbers, c)) return 0x1D7CE;
  return c;
}

// Fills `copy` with the text to match against and returns true if it differs from `text`.
bool MakeStandIns(std::string_view text, std::string* copy) {
  for (size_t pos = 0; pos < text.size();) {
    const auto lead = static_cast<unsigned char>(text[pos]);
    // The characters that differ start with these bytes: U+1xxx, U+Axxx, and all above U+FFFF.
    if (lead != 0xE1 && lead != 0xEA && lead < 0xF0) {
      ++pos;
      continue;
    }
    const size_t start = pos;
    const uint32_t c = NextCodePoint(text, &pos);
    const uint32_t stand_in = StandIn(c);
    if (stand_in == c) continue;
    if (copy->empty()) copy->assign(text);
    std::string bytes;
    AppendCodePoint(stand_in, &bytes);
    copy->replace(start, pos - start, bytes);
  }
  return !copy->empty();
}

std::string Pcre2Message(int code) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(code, buffer, sizeof(buffer)) < 0) return "unknown error";
  return reinterpret_cast<const char*>(buffer);
}

struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct MatchContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

}  // namespace

struct SplitPattern::Code {
  explicit Code(pcre2_code* compiled) : code(compiled) {}
  ~Code() { pcre2_code_free(code); }
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;

  pcre2_code* const code;
};

absl::StatusOr<SplitPattern> SplitPattern::Compile(std::string_view regex) {
  if (regex.empty() || regex.size() > kMaxPatternBytes) {
    return InvalidArgument("the pattern must have 1 to {} bytes, got {}", kMaxPatternBytes,
                           regex.size());
  }
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* compiled =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(regex.data()), regex.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (compiled == nullptr) {
    return InvalidArgument("not a valid pattern at byte {}: {}", offset, Pcre2Message(error));
  }
  auto code = std::make_shared<Code>(compiled);
  uint32_t matches_empty = 0;
  pcre2_pattern_info(compiled, PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) {
    return InvalidArgument("the pattern can match an empty text, so it cannot cut text into pieces");
  }
  // Where JIT is not available matching falls back to the interpreter by itself.
  pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
  return SplitPattern(std::move(code));
}

absl::Status SplitPattern::Split(std::string_view text, std::vector<size_t>* ends) const {
  std::string stand_ins;
  const std::string_view subject = MakeStandIns(text, &stand_ins) ? stand_ins : text;
  const std::unique_ptr<pcre2_match_data, MatchDataDeleter> match(
      pcre2_match_data_create(1, nullptr));
  const std::unique_ptr<pcre2_match_context, MatchContextDeleter> context(
      pcre2_match_context_create(nullptr));
  if (match == nullptr || context == nullptr) return ResourceExhausted("out of memory");
  const uint64_t limit = kMatchLimitBase + kMatchLimitPerByte * subject.size();
  pcre2_set_match_limit(context.get(),
                        static_cast<uint32_t>(std::min<uint64_t>(limit, UINT32_MAX)));
  pcre2_set_heap_limit(context.get(), kHeapLimitKiB);

  const auto* data = reinterpret_cast<PCRE2_SPTR>(subject.data());
  size_t pos = 0;
  while (pos < subject.size()) {
    int rc = pcre2_match(code_->code, data, subject.size(), pos, PCRE2_NO_UTF_CHECK, match.get(),
                         context.get());
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code_->code, data, subject.size(), pos, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                       match.get(), context.get());
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return ResourceExhausted("cutting the text at byte {} with the tokenizer's pattern failed: {}",
                               pos, Pcre2Message(rc));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
    // \K in a lookaround can give spans that do not advance; a pattern that does so cannot cut text.
    if (span[1] <= span[0] || span[0] < pos) {
      return InvalidArgument("the tokenizer's pattern gives an impossible match at byte {}", pos);
    }
    if (span[0] > pos) ends->push_back(span[0]);
    ends->push_back(span[1]);
    pos = span[1];
  }
  if (pos < subject.size()) ends->push_back(subject.size());
  return absl::OkStatus();
}

}  // namespace tandem
