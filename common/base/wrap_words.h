// Text for people, in lines that end between words.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tandem {

// `text` in lines of at most `width` columns where its words allow, each after the first begun by
// `indent` blanks. The first begins at `column`. Blanks and newlines count as one blank.
std::string WrapWords(std::string_view text, size_t width, size_t indent, size_t column = 0);

}  // namespace tandem
