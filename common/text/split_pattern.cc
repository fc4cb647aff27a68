#include "common/text/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <algorithm>
#include <cstdint>
#include <pcre2.h>
#include <utility>

#include "common/base/status.h"
#include "common/text/new_characters.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr size_t kMaxPatternBytes = 4096;
// Backtracking allowed per call: a constant and a share per byte, as `\s*[\r\n]+` may give back a
// whole run of blanks.
constexpr uint64_t kMatchLimitBase = 10'000'000;
constexpr uint64_t kMatchLimitPerByte = 16;
constexpr uint32_t kHeapLimitKiB = 512 * 1024;

// The character to show PCRE2 in place of `c`; of the same length in UTF-8.
uint32_t StandIn(uint32_t c) {
  if (c == 0x180E) return 0x2060;  // a format character that is no white space
  if (IsNewLetter(c)) return c < 0x10000 ? 0x4E00 : 0x20000;
  if (IsNewNumber(c)) return 0x1D7CE;
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
    return InvalidArgument(
        "the pattern can match an empty text, so it cannot cut text into pieces");
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
      return ResourceExhausted(
          "cutting the text at byte {} with the tokenizer's pattern failed: {}", pos,
          Pcre2Message(rc));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
    // \K in a lookaround can give spans that do not advance; a pattern that does so cannot cut
    // text.
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
