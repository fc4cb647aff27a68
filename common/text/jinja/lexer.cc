#include "common/text/jinja/lexer.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <utility>

#include "common/base/status.h"
#include "common/text/utf8.h"

namespace tandem::jinja {
namespace {

using TokenKind = Token::Kind;

bool IsSpace(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }
bool IsDigit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }
bool IsWord(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {
    // Jinja drops one line end at the end of a template.
    if (!source_.empty() && source_.back() == '\n') source_.remove_suffix(1);
  }

  absl::StatusOr<std::vector<Token>> Run() {
    while (pos_ < source_.size()) {
      const size_t open = FindTag();
      ReadText(open);
      if (pos_ < source_.size()) TANDEM_RETURN_IF_ERROR(ReadTag());
    }
    Add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  void Add(TokenKind kind, std::string value) {
    tokens_.push_back({kind, std::move(value), Line()});
  }
  // The line of pos_, counted on from the last time: pos_ never goes back.
  int Line() {
    line_ +=
        static_cast<int>(std::count(source_.begin() + line_pos_, source_.begin() + pos_, '\n'));
    line_pos_ = pos_;
    return line_;
  }
  absl::Status Error(std::string_view what) { return InvalidArgument("line {}: {}", Line(), what); }

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
    if (!text.empty()) Add(TokenKind::kText, std::string(text));
    pos_ = open;
  }

  absl::Status ReadTag() {
    const char type = source_[pos_ + 1];
    pos_ += 2;
    if (type == '#') {
      const size_t close = source_.find("#}", pos_);
      if (close == std::string_view::npos) return Error("a comment is not closed");
      EndTag(close + 2, source_[close - 1], /*is_block=*/true);
      return absl::OkStatus();
    }
    if (pos_ < source_.size() && (source_[pos_] == '-' || source_[pos_] == '+')) ++pos_;
    const bool is_block = type == '%';
    Add(is_block ? TokenKind::kBlockBegin : TokenKind::kVariableBegin, "");
    const std::string closing = is_block ? "%}" : "}}";
    int depth = 0;  // of brackets, for "}}" may also end two dictionaries
    while (pos_ < source_.size()) {
      const std::string_view rest = source_.substr(pos_);
      const size_t sign = rest[0] == '-' || rest[0] == '+' ? 1 : 0;
      if (depth == 0 && rest.substr(sign).starts_with(closing)) {
        Add(is_block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, "");
        EndTag(pos_ + sign + 2, rest[0], is_block);
        return absl::OkStatus();
      }
      TANDEM_RETURN_IF_ERROR(ReadToken(&depth));
    }
    return Error("a tag is not closed");
  }

  // White space behind a tag: all of it for "-", one line end for a block (trim_blocks).
  void EndTag(size_t end, char sign, bool is_block) {
    pos_ = end;
    strip_next_ = sign == '-';
    trimmed_line_end_ = false;
    if (strip_next_ || !is_block || sign == '+') return;
    if (pos_ < source_.size() && source_[pos_] == '\n') {
      ++pos_;
      trimmed_line_end_ = true;
    }
  }

  absl::Status ReadToken(int* depth) {
    const char c = source_[pos_];
    if (IsSpace(c)) {
      ++pos_;
    } else if (c == '\'' || c == '"') {
      return ReadString();
    } else if (IsDigit(c)) {
      ReadNumber();
    } else if (IsWord(c)) {
      size_t end = pos_;
      while (end < source_.size() && IsWord(source_[end])) ++end;
      Add(TokenKind::kName, std::string(source_.substr(pos_, end - pos_)));
      pos_ = end;
    } else {
      if (c == '(' || c == '[' || c == '{') ++*depth;
      if (c == ')' || c == ']' || c == '}') --*depth;
      ReadOperator();
    }
    return absl::OkStatus();
  }

  void ReadNumber() {
    size_t end = pos_;
    while (end < source_.size() && IsDigit(source_[end])) ++end;
    const bool is_float =
        end + 1 < source_.size() && source_[end] == '.' && IsDigit(source_[end + 1]);
    if (is_float) {
      ++end;
      while (end < source_.size() && IsDigit(source_[end])) ++end;
    }
    Add(is_float ? TokenKind::kFloat : TokenKind::kInteger,
        std::string(source_.substr(pos_, end - pos_)));
    pos_ = end;
  }

  void ReadOperator() {
    const std::string_view rest = source_.substr(pos_);
    size_t length = 1;
    for (const std::string_view two : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (rest.starts_with(two)) length = 2;
    }
    Add(TokenKind::kOperator, std::string(rest.substr(0, length)));
    pos_ += length;
  }

  absl::Status ReadString() {
    const char quote = source_[pos_++];
    std::string value;
    while (pos_ < source_.size()) {
      const char c = source_[pos_++];
      if (c == quote) {
        Add(TokenKind::kString, std::move(value));
        return absl::OkStatus();
      }
      if (c != '\\' || pos_ == source_.size()) {
        value.push_back(c);
      } else {
        ReadEscape(&value);
      }
    }
    return Error("a string is not closed");
  }

  // What follows a backslash. As in Python, an unknown escape stays as it is.
  void ReadEscape(std::string* out) {
    constexpr std::string_view kLetters = "abfnrtv\\'\"";
    constexpr std::string_view kMeanings = "\a\b\f\n\r\t\v\\'\"";
    const char c = source_[pos_++];
    const size_t simple = kLetters.find(c);
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    const std::string_view hex = source_.substr(pos_, digits);
    uint32_t code_point = 0;
    const auto parsed = std::from_chars(hex.data(), hex.data() + hex.size(), code_point, 16);
    const bool is_scalar = code_point < 0x110000 && (code_point < 0xD800 || code_point > 0xDFFF);
    if (simple != std::string_view::npos) {
      out->push_back(kMeanings[simple]);
    } else if (digits > 0 && hex.size() == digits && parsed.ptr == hex.data() + digits &&
               is_scalar) {
      AppendCodePoint(code_point, out);
      pos_ += digits;
    } else if (c != '\n') {
      out->push_back('\\');
      out->push_back(c);
    }
  }

  std::string_view source_;
  size_t pos_ = 0;
  size_t line_pos_ = 0;  // up to where line_ is counted
  int line_ = 1;
  bool strip_next_ = false;        // the tag before ends in "-"
  bool trimmed_line_end_ = false;  // the tag before took the line end behind it
  std::vector<Token> tokens_;
};

}  // namespace

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) { return Lexer(source).Run(); }

}  // namespace tandem::jinja
