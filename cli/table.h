// A table in plain text: first row is the heading, columns as wide as needed, numbers to the right.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tandem::cli {

// Rows may be ragged; missing cells are empty. Ends with a newline. Widths count code points.
std::string RenderTable(const std::vector<std::vector<std::string>>& rows);

// The same in at most `width` columns of text: as long as it is wider, the columns of
// `dispensable` are left out, the first of them first.
std::string RenderTable(const std::vector<std::vector<std::string>>& rows, size_t width,
                        const std::vector<std::string>& dispensable);

}  // namespace tandem::cli
