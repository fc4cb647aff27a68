// How wide a text is on a screen; what these tests print is ASCII.
#pragma once

#include <algorithm>
#include <cstddef>
#include <sstream>
#include <string>

namespace tandem::cli {

inline size_t WidestLine(const std::string& text) {
  size_t widest = 0;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) widest = std::max(widest, line.size());
  return widest;
}

}  // namespace tandem::cli
