// Characters of Unicode 15 and 16 that PCRE2 10.42 (Unicode 14) and utf8proc 2.8 (Unicode 15) do
// not know yet, but Hugging Face tokenizers does. Where the libraries are newer these tables change
// nothing.
//
// Pure functions, thread-safe.
#pragma once

#include <cstdint>

namespace tandem {

bool IsNewLetter(uint32_t c);  // general category L
bool IsNewNumber(uint32_t c);  // general category N
// Letters, marks and decimal digits: \w of a regular expression.
bool IsNewWordCharacter(uint32_t c);

}  // namespace tandem
