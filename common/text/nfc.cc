#include "common/text/nfc.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <unordered_map>
#include <utf8proc.h>
#include <utility>

#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr uint32_t kCodePoints = 0x110000;

// Hangul syllables compose by arithmetic (Unicode 15.0, section 3.12).
constexpr uint32_t kHangulS = 0xAC00, kHangulL = 0x1100, kHangulV = 0x1161, kHangulT = 0x11A7;
constexpr uint32_t kHangulLCount = 19, kHangulVCount = 21, kHangulTCount = 28;
constexpr uint32_t kHangulSCount = kHangulLCount * kHangulVCount * kHangulTCount;

struct MarkRange {
  uint32_t first;
  uint32_t last;
};

// Combining marks newer than Hugging Face's normalisation tables: no combining class there.
constexpr MarkRange kMarksWithoutClass[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27},
    {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};
// The one composite newer than those tables (Dives Akuru vowel sign O).
constexpr uint32_t kCompositeUnknown = 0x11938;

int CombiningClass(uint32_t c) {
  const int ccc = utf8proc_get_property(static_cast<utf8proc_int32_t>(c))->combining_class;
  if (ccc == 0) return 0;
  const auto* range =
      std::lower_bound(std::begin(kMarksWithoutClass), std::end(kMarksWithoutClass), c,
                       [](const MarkRange& r, uint32_t v) { return r.last < v; });
  return range != std::end(kMarksWithoutClass) && range->first <= c ? 0 : ccc;
}

// Full canonical decomposition of `c`, appended to `out`.
void AppendDecomposed(uint32_t c, std::vector<uint32_t>* out) {
  if (c == kCompositeUnknown) {
    out->push_back(c);
    return;
  }
  utf8proc_int32_t buffer[16];
  int last_boundclass = 0;
  const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), buffer,
                                         std::size(buffer), UTF8PROC_DECOMPOSE, &last_boundclass);
  if (n <= 0 || n > static_cast<utf8proc_ssize_t>(std::size(buffer))) {
    out->push_back(c);
    return;
  }
  out->insert(out->end(), buffer, buffer + n);
}

bool IsHangulVowelOrTail(uint32_t c) {
  return (c >= kHangulV && c < kHangulV + kHangulVCount) ||
         (c > kHangulT && c < kHangulT + kHangulTCount);
}

class Tables {
 public:
  static const Tables& Get() {
    static const Tables* const tables = new Tables;
    return *tables;
  }

  // True unless `c` is normalised by itself, has combining class 0 and never combines with what
  // precedes it. A text may be cut before any character for which this is false.
  bool NeedsWork(uint32_t c) const { return needs_work_[c]; }

  // The primary composite of `first` and `second`, or 0.
  uint32_t Compose(uint32_t first, uint32_t second) const {
    if (first >= kHangulL && first < kHangulL + kHangulLCount && second >= kHangulV &&
        second < kHangulV + kHangulVCount) {
      return kHangulS + ((first - kHangulL) * kHangulVCount + (second - kHangulV)) * kHangulTCount;
    }
    if (first >= kHangulS && first < kHangulS + kHangulSCount &&
        (first - kHangulS) % kHangulTCount == 0 && second > kHangulT &&
        second < kHangulT + kHangulTCount) {
      return first + (second - kHangulT);
    }
    const auto it = composites_.find(uint64_t{first} << 32 | second);
    return it == composites_.end() ? 0 : it->second;
  }

 private:
  Tables() : needs_work_(kCodePoints) {
    std::map<std::vector<uint32_t>, uint32_t> by_decomposition;
    for (uint32_t c = 0x80; c < kCodePoints; ++c) {
      if (CombiningClass(c) != 0 || IsHangulVowelOrTail(c)) needs_work_[c] = true;
      const utf8proc_property_t* property = utf8proc_get_property(static_cast<int32_t>(c));
      if (property->decomp_seqindex == UINT16_MAX || property->decomp_type != 0) continue;
      std::vector<uint32_t> full;
      AppendDecomposed(c, &full);
      if (full.size() == 1 && full[0] == c) continue;
      if (full.size() >= 2 && IsPrimaryComposite(c)) {
        by_decomposition.emplace(std::move(full), c);
      } else {
        needs_work_[c] = true;
      }
    }
    // A composite's full decomposition is that of a shorter composite (or one character) and one
    // more character; that pair is what composes.
    for (const auto& [full, c] : by_decomposition) {
      uint32_t first = full[0];
      if (full.size() > 2) {
        const auto prefix = by_decomposition.find({full.begin(), full.end() - 1});
        if (prefix == by_decomposition.end()) continue;
        first = prefix->second;
      }
      composites_.emplace(uint64_t{first} << 32 | full.back(), c);
      needs_work_[full.back()] = true;
    }
  }

  // Whether composing the decomposition of `c` gives `c` back: not so for the composition
  // exclusions and for characters that are another spelling of one character (U+212B, Angstrom
  // sign).
  static bool IsPrimaryComposite(uint32_t c) {
    std::string bytes;
    AppendCodePoint(c, &bytes);
    utf8proc_uint8_t* normalized = nullptr;
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(bytes.data()),
                     static_cast<utf8proc_ssize_t>(bytes.size()), &normalized,
                     static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (size < 0) return false;
    const bool same = std::string_view(reinterpret_cast<char*>(normalized), size) == bytes;
    std::free(normalized);  // utf8proc allocates with malloc
    return same;
  }

  std::vector<bool> needs_work_;
  std::unordered_map<uint64_t, uint32_t> composites_;
};

// Appends the normalised form of `chunk`, which starts at a place where text may be cut.
void AppendNormalized(std::string_view chunk, std::string* out) {
  const Tables& tables = Tables::Get();
  std::vector<uint32_t> decomposed;
  for (size_t pos = 0; pos < chunk.size();) {
    AppendDecomposed(NextCodePoint(chunk, &pos), &decomposed);
  }
  std::vector<std::pair<int, uint32_t>> chars;  // (combining class, character)
  chars.reserve(decomposed.size());
  for (const uint32_t c : decomposed) chars.emplace_back(CombiningClass(c), c);
  for (size_t i = 0; i < chars.size();) {
    size_t end = i;
    while (end < chars.size() && chars[end].first != 0) ++end;
    std::stable_sort(chars.begin() + i, chars.begin() + end,
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    i = end + 1;
  }
  // Each character composes with the last starter unless a character between them has the same or a
  // higher class.
  std::vector<uint32_t> composed;
  size_t starter = SIZE_MAX;
  int last_class = -1;  // of the last character kept behind the starter; -1: none
  for (const auto& [ccc, c] : chars) {
    if (starter != SIZE_MAX && last_class < ccc) {
      if (const uint32_t composite = tables.Compose(composed[starter], c); composite != 0) {
        composed[starter] = composite;
        continue;
      }
    }
    if (ccc == 0) {
      starter = composed.size();
      last_class = -1;
    } else {
      last_class = ccc;
    }
    composed.push_back(c);
  }
  for (const uint32_t c : composed) AppendCodePoint(c, out);
}

// Below U+0300 every character stands for itself and combines with nothing before it.
constexpr unsigned char kFirstLeadByteOfU0300 = 0xCC;

}  // namespace

bool IsSurelyNfc(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    const auto lead = static_cast<unsigned char>(text[pos]);
    if (lead < kFirstLeadByteOfU0300) {
      pos += lead < 0x80 ? 1 : 2;
      continue;
    }
    // Not before: to make the tables takes milliseconds, which Latin text need not wait for.
    if (Tables::Get().NeedsWork(NextCodePoint(text, &pos))) return false;
  }
  return true;
}

std::string ToNfc(std::string_view text, std::vector<NfcChange>* changes) {
  const Tables& tables = Tables::Get();
  std::string out;
  out.reserve(text.size());
  size_t copied = 0;  // text before this is in `out`
  size_t safe = 0;    // start of the last character before which text may be cut
  for (size_t pos = 0; pos < text.size();) {
    const size_t start = pos;
    if (!tables.NeedsWork(NextCodePoint(text, &pos))) {
      safe = start;
      continue;
    }
    size_t end = pos;
    while (end < text.size()) {
      size_t next = end;
      if (!tables.NeedsWork(NextCodePoint(text, &next))) break;
      end = next;
    }
    out.append(text.substr(copied, safe - copied));
    const size_t out_begin = out.size();
    AppendNormalized(text.substr(safe, end - safe), &out);
    if (changes != nullptr) changes->push_back({safe, end, out_begin, out.size()});
    copied = safe = pos = end;
  }
  out.append(text.substr(copied));
  return out;
}

}  // namespace tandem
