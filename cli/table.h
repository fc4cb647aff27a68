// A table in plain text: first row is the heading, columns as wide as needed, numbers to the right.
#pragma once

#include <string>
#include <vector>

namespace tandem::cli {

// Rows may be ragged; missing cells are empty. Ends with a newline. Widths count code points.
std::string RenderTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace tandem::cli
