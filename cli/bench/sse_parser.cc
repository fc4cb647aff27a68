#include "cli/bench/sse_parser.h"

namespace tandem::cli {

void SseParser::Push(std::string_view piece,
                     const std::function<void(std::string_view data)>& on_data) {
  constexpr std::string_view kData = "data:";
  line_ += piece;
  size_t begin = 0;
  for (size_t end; (end = line_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string_view line = std::string_view(line_).substr(begin, end - begin);
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.starts_with(kData)) continue;
    line.remove_prefix(kData.size());
    if (line.starts_with(' ')) line.remove_prefix(1);
    on_data(line);
  }
  line_.erase(0, begin);
}

}  // namespace tandem::cli
