#include "common/base/wrap_words.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace tandem {
namespace {

// Of UTF-8, whose characters count as one column each.
size_t Columns(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

}  // namespace

std::string WrapWords(std::string_view text, size_t width, size_t indent, size_t column) {
  std::string out;
  bool begins = true;  // a line
  const std::vector<std::string> words = absl::StrSplit(absl::string_view(text.data(), text.size()),
                                                        absl::ByAnyChar(" \n"), absl::SkipEmpty());
  for (const std::string& word : words) {
    const size_t columns = Columns(word);
    if (!begins && column + 1 + columns > width) {
      out += "\n" + std::string(indent, ' ');
      column = indent;
    } else if (!begins) {
      out += ' ';
      ++column;
    }
    out += word;
    column += columns;
    begins = false;
  }
  return out;
}

}  // namespace tandem
