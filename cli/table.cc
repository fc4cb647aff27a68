#include "cli/table.h"

#include <algorithm>
#include <cstddef>
#include <sstream>

namespace tandem::cli {
namespace {

size_t Width(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

size_t WidestLine(const std::string& text) {
  size_t widest = 0;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) widest = std::max(widest, Width(line));
  return widest;
}

bool LooksNumeric(const std::string& text) {
  return text.empty() || text == "-" || (text[0] >= '0' && text[0] <= '9');
}

}  // namespace

std::string RenderTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  std::vector<bool> numeric;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t c = 0; c < rows[r].size(); ++c) {
      if (c == widths.size()) {
        widths.push_back(0);
        numeric.push_back(true);
      }
      widths[c] = std::max(widths[c], Width(rows[r][c]));
      if (r > 0 && !LooksNumeric(rows[r][c])) numeric[c] = false;
    }
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < widths.size(); ++c) {
      const std::string cell = c < row.size() ? row[c] : "";
      const std::string padding(widths[c] - Width(cell), ' ');
      if (c > 0) line += "  ";
      line += numeric[c] ? padding + cell : cell + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string RenderTable(const std::vector<std::vector<std::string>>& rows, size_t width,
                        const std::vector<std::string>& dispensable) {
  std::vector<std::vector<std::string>> kept = rows;
  std::string text = RenderTable(kept);
  for (const std::string& name : dispensable) {
    if (WidestLine(text) <= width || kept.empty()) break;
    const auto column = std::find(kept[0].begin(), kept[0].end(), name) - kept[0].begin();
    for (auto& row : kept) {
      if (column < static_cast<std::ptrdiff_t>(row.size())) row.erase(row.begin() + column);
    }
    text = RenderTable(kept);
  }
  return text;
}

}  // namespace tandem::cli
