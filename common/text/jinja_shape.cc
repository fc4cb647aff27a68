#include "common/text/jinja_shape.h"

#include <cctype>
#include <utility>

namespace tandem {
namespace {

using Kind = JinjaToken::Kind;

bool IsSpace(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }
bool IsWord(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

bool IsName(std::string_view text) {
  if (text.empty() || std::isdigit(static_cast<unsigned char>(text[0]))) return false;
  for (const char c : text) {
    if (!IsWord(c)) return false;
  }
  return true;
}

class Reader {
 public:
  explicit Reader(std::string_view source) : source_(source) {}

  std::optional<std::vector<JinjaToken>> Read() {
    // Jinja drops one line end at the end of a template.
    if (!source_.empty() && source_.back() == '\n') source_.remove_suffix(1);
    while (pos_ < source_.size()) {
      const size_t open = FindTag();
      ReadText(open);
      if (pos_ < source_.size() && !ReadTag()) return std::nullopt;
    }
    return std::move(tokens_);
  }

 private:
  size_t FindTag() const {
    for (size_t i = pos_; i + 1 < source_.size(); ++i) {
      const char next = source_[i + 1];
      if (source_[i] == '{' && (next == '{' || next == '%' || next == '#')) return i;
    }
    return source_.size();
  }

  // Text from pos_ up to the tag at `open`, less the white space that the tags on both sides take.
  void ReadText(size_t open) {
    std::string_view text = source_.substr(pos_, open - pos_);
    const bool at_tag = open < source_.size();
    const char sign = at_tag && open + 2 < source_.size() ? source_[open + 2] : '\0';
    if (at_tag && sign == '-') {
      while (!text.empty() && IsSpace(text.back())) text.remove_suffix(1);
    } else if (at_tag && sign != '+' && source_[open + 1] != '{') {
      // lstrip_blocks: blanks between the start of a line and a block go.
      size_t keep = text.size();
      while (keep > 0 && (text[keep - 1] == ' ' || text[keep - 1] == '\t')) --keep;
      const bool line_start = keep > 0 ? text[keep - 1] == '\n' : pos_ == 0 || trimmed_line_end_;
      if (line_start) text = text.substr(0, keep);
    }
    if (strip_next_) {
      while (!text.empty() && IsSpace(text.front())) text.remove_prefix(1);
    }
    if (!text.empty()) tokens_.push_back({Kind::kText, std::string(text)});
    pos_ = open;
  }

  bool ReadTag() {
    const char type = source_[pos_ + 1];
    pos_ += 2;
    if (pos_ < source_.size() && (source_[pos_] == '-' || source_[pos_] == '+')) ++pos_;
    if (type == '#') {
      const size_t close = source_.find("#}", pos_);
      if (close == std::string_view::npos) return false;
      pos_ = close + 2;
      EndTag(close > 0 && source_[close - 1] == '-', /*is_block=*/true);
      return true;
    }
    const char closing = type == '{' ? '}' : '%';
    tokens_.push_back({Kind::kMark, type == '{' ? "{{" : "{%"});
    while (pos_ < source_.size()) {
      const char c = source_[pos_];
      const std::string_view rest = source_.substr(pos_);
      const size_t sign = c == '-' ? 1 : 0;
      if (rest.size() >= sign + 2 && rest[sign] == closing && rest[sign + 1] == '}') {
        tokens_.push_back({Kind::kMark, type == '{' ? "}}" : "%}"});
        pos_ += sign + 2;
        EndTag(sign == 1, type == '%');
        return true;
      }
      if (IsSpace(c)) {
        ++pos_;
      } else if (c == '\'' || c == '"') {
        if (!ReadString()) return false;
      } else {
        ReadWordOrMark();
      }
    }
    return false;
  }

  // White space behind a tag: all of it for "-", one line end for a block (trim_blocks).
  void EndTag(bool strip, bool is_block) {
    strip_next_ = strip;
    trimmed_line_end_ = false;
    if (strip || !is_block) return;
    if (pos_ < source_.size() && source_[pos_] == '\n') {
      ++pos_;
      trimmed_line_end_ = true;
    }
  }

  bool ReadString() {
    const char quote = source_[pos_++];
    std::string value;
    while (pos_ < source_.size()) {
      char c = source_[pos_++];
      if (c == quote) {
        tokens_.push_back({Kind::kString, std::move(value)});
        return true;
      }
      if (c == '\\') {
        if (pos_ == source_.size()) return false;
        switch (source_[pos_++]) {
          case 'n':
            c = '\n';
            break;
          case 'r':
            c = '\r';
            break;
          case 't':
            c = '\t';
            break;
          case '\\':
            c = '\\';
            break;
          case '\'':
            c = '\'';
            break;
          case '"':
            c = '"';
            break;
          default:
            return false;
        }
      }
      value.push_back(c);
    }
    return false;
  }

  void ReadWordOrMark() {
    size_t end = pos_ + 1;
    if (IsWord(source_[pos_])) {
      while (end < source_.size() && IsWord(source_[end])) ++end;
    }
    tokens_.push_back({Kind::kMark, std::string(source_.substr(pos_, end - pos_))});
    pos_ = end;
    FoldSubscript();
  }

  // Turns x [ 'name' ] at the end of the tokens into x . name.
  void FoldSubscript() {
    const size_t n = tokens_.size();
    if (n < 4 || tokens_[n - 1] != JinjaToken{Kind::kMark, "]"}) return;
    if (tokens_[n - 2].kind != Kind::kString || !IsName(tokens_[n - 2].value)) return;
    if (tokens_[n - 3] != JinjaToken{Kind::kMark, "["}) return;
    const JinjaToken& owner = tokens_[n - 4];
    if (owner.kind != Kind::kMark || (!IsName(owner.value) && owner.value != "]")) return;
    tokens_[n - 3].value = ".";
    tokens_[n - 2].kind = Kind::kMark;
    tokens_.pop_back();
  }

  std::string_view source_;
  size_t pos_ = 0;
  bool strip_next_ = false;        // the tag before ends in "-"
  bool trimmed_line_end_ = false;  // the tag before took the line end behind it
  std::vector<JinjaToken> tokens_;
};

}  // namespace

std::optional<std::vector<JinjaToken>> ReadJinja(std::string_view source) {
  return Reader(source).Read();
}

bool MatchJinja(const std::vector<JinjaToken>& pattern, std::string_view hole,
                const std::vector<JinjaToken>& tokens, std::vector<std::string>* captures) {
  captures->clear();
  if (pattern.size() != tokens.size()) return false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == tokens[i]) continue;
    const std::string_view want = pattern[i].value;
    const std::string_view have = tokens[i].value;
    const size_t at = want.find(hole);
    if (pattern[i].kind != Kind::kString || tokens[i].kind != Kind::kString) return false;
    if (at == std::string_view::npos) return false;
    const std::string_view before = want.substr(0, at);
    const std::string_view after = want.substr(at + hole.size());
    if (have.size() < before.size() + after.size() || !have.starts_with(before) ||
        !have.ends_with(after)) {
      return false;
    }
    captures->emplace_back(have.substr(before.size(), have.size() - before.size() - after.size()));
  }
  return true;
}

}  // namespace tandem
