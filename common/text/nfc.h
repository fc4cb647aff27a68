// Unicode Normalization Form C, as Hugging Face tokenizers computes it.
//
// Thread-safe. Linear in the text but for sorting runs of combining marks (n log n), so that
// hostile runs of them cost no more than ordinary text; utf8proc, whose character data this uses,
// sorts such runs in quadratic time.
//
// Differs from Unicode 15 in one point: combining marks assigned after Unicode 9 count as ordinary
// characters, because they do for Hugging Face, and ids must be equal.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace tandem {

// A part of the input that normalisation changed: [in_begin, in_end) of the input became
// [out_begin, out_end). What stands between two changes was copied.
struct NfcChange {
  size_t in_begin;
  size_t in_end;
  size_t out_begin;
  size_t out_end;
};

// Whether `text` (valid UTF-8) is normalised already beyond doubt; false may be a false alarm. One
// cheap pass.
bool IsSurelyNfc(std::string_view text);

// Normalises `text` (valid UTF-8). `changes`, when given, receives in order the parts that were
// looked at closely (some may be equal before and after).
std::string ToNfc(std::string_view text, std::vector<NfcChange>* changes = nullptr);

}  // namespace tandem
