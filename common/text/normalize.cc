#include "common/text/normalize.h"

#include "common/base/status.h"
#include "common/text/nfc.h"
#include "common/text/utf8.h"

namespace tandem {

absl::StatusOr<std::string> NormalizePrompt(std::string_view text) {
  if (const auto bad = FindInvalidUtf8(text); bad.has_value()) {
    return InvalidArgument("text is not valid UTF-8 at byte {}", *bad);
  }
  std::string out;
  out.reserve(text.size());
  size_t line_content_end = 0;  // end of what the current line keeps if it ends now
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '\r') {
      if (i + 1 < text.size() && text[i + 1] == '\n') ++i;
      c = '\n';
    }
    if (c == '\n') out.resize(line_content_end);
    out.push_back(c);
    if (c != ' ' && c != '\t') line_content_end = out.size();
  }
  out.resize(line_content_end);
  return IsSurelyNfc(out) ? out : ToNfc(out);
}

}  // namespace tandem
