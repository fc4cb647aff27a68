#include "common/text/json.h"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "common/base/status.h"

namespace tandem {
namespace {

using nlohmann::json;

// Refuses nesting beyond kMaxJsonDepth before any parser sees it.
absl::Status CheckDepth(std::string_view text, std::string_view what) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxJsonDepth) {
        return InvalidArgument("{}: JSON is nested deeper than {} at byte {}", what, kMaxJsonDepth,
                               i);
      }
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return absl::OkStatus();
}

// The parser's message without its "[json.exception...] parse error at line 1, column 5: " prefix.
std::string ShortMessage(const std::string& message) {
  const size_t prefix = message.find("] ");
  return prefix == std::string::npos ? message : message.substr(prefix + 2);
}

}  // namespace

std::string PythonFloat(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value < 0 ? "-inf" : "inf";
  char buffer[32];
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  std::string_view text(buffer, end.ptr - buffer);
  std::string sign;
  if (text.front() == '-') {
    sign = "-";
    text.remove_prefix(1);
  }
  const size_t e = text.find('e');
  int exponent = 0;
  const size_t exponent_at = e + (text[e + 1] == '+' ? 2 : 1);
  std::from_chars(text.data() + exponent_at, text.data() + text.size(), exponent);
  std::string digits(text.substr(0, 1));
  if (e > 2) digits.append(text.substr(2, e - 2));
  if (exponent < -4 || exponent >= 16) {
    std::string out = sign + digits.substr(0, 1);
    if (digits.size() > 1) out += "." + digits.substr(1);
    return out + fmt::format("e{}{:02}", exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  if (exponent < 0) return sign + "0." + std::string(-exponent - 1, '0') + digits;
  const auto whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= whole) return sign + digits + std::string(whole - digits.size(), '0') + ".0";
  return sign + digits.substr(0, whole) + "." + digits.substr(whole);
}

void AppendJsonString(std::string_view text, std::string* out) {
  out->push_back('"');
  for (const char c : text) {
    switch (c) {
      case '"':
        out->append("\\\"");
        break;
      case '\\':
        out->append("\\\\");
        break;
      case '\n':
        out->append("\\n");
        break;
      case '\r':
        out->append("\\r");
        break;
      case '\t':
        out->append("\\t");
        break;
      case '\f':
        out->append("\\f");
        break;
      case '\b':
        out->append("\\b");
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out->append(fmt::format("\\u{:04x}", static_cast<unsigned>(c)));
        } else {
          out->push_back(c);
        }
    }
  }
  out->push_back('"');
}

namespace {

// Writes the values that nlohmann's parser reports. Also remembers where parsing failed.
class PythonWriter {
 public:
  using number_integer_t = json::number_integer_t;
  using number_unsigned_t = json::number_unsigned_t;
  using number_float_t = json::number_float_t;
  using string_t = json::string_t;
  using binary_t = json::binary_t;

  bool null() { return Add("null"); }
  bool boolean(bool value) { return Add(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) { return Add(std::to_string(value)); }
  bool number_unsigned(number_unsigned_t value) { return Add(std::to_string(value)); }
  bool number_float(number_float_t value, const string_t& text) {
    // An integer beyond 64 bits arrives here; Python keeps all its digits.
    if (text.find_first_of(".eE") == std::string::npos) return Add(text);
    if (!std::isfinite(value)) return Fail("number out of range: " + text);
    return Add(PythonFloat(value));
  }
  bool string(string_t& value) {
    std::string quoted;
    AppendJsonString(value, &quoted);
    return Add(std::move(quoted));
  }
  bool binary(binary_t&) { return Fail("binary value"); }
  bool start_object(size_t) { return Start(true); }
  bool key(string_t& name) {
    stack_.back().pending_key = name;
    return true;
  }
  bool end_object() {
    std::string out = "{";
    for (const auto& [name, value] : stack_.back().members) {
      if (out.size() > 1) out += ", ";
      AppendJsonString(name, &out);
      out += ": " + value;
    }
    stack_.pop_back();
    return Add(out + "}");
  }
  bool start_array(size_t) { return Start(false); }
  bool end_array() {
    std::string out = "[";
    for (const auto& [name, value] : stack_.back().members) {
      if (out.size() > 1) out += ", ";
      out += value;
    }
    stack_.pop_back();
    return Add(out + "]");
  }
  bool parse_error(size_t position, const std::string&, const json::exception& error) {
    position_ = position;
    return Fail(ShortMessage(error.what()));
  }

  size_t position() const { return position_; }
  const std::string& error() const { return error_; }
  std::string TakeResult() { return std::move(result_); }

 private:
  struct Frame {
    bool is_object;
    std::string pending_key;
    std::vector<std::pair<std::string, std::string>> members;  // arrays leave the keys empty
    absl::flat_hash_map<std::string, size_t> places;           // of the keys in `members`
  };

  bool Start(bool is_object) {
    stack_.push_back({is_object, {}, {}, {}});
    return true;
  }
  bool Add(std::string value) {
    if (stack_.empty()) {
      result_ = std::move(value);
      return true;
    }
    Frame& frame = stack_.back();
    if (frame.is_object) {
      const auto [it, is_new] = frame.places.emplace(frame.pending_key, frame.members.size());
      if (!is_new) {
        frame.members[it->second].second = std::move(value);
        return true;
      }
    }
    frame.members.emplace_back(std::move(frame.pending_key), std::move(value));
    frame.pending_key.clear();
    return true;
  }
  bool Fail(std::string message) {
    error_ = std::move(message);
    return false;
  }

  std::vector<Frame> stack_;
  std::string result_;
  std::string error_;
  size_t position_ = 0;
};

}  // namespace

absl::StatusOr<json> ParseJson(std::string_view text, std::string_view what) {
  TANDEM_RETURN_IF_ERROR(CheckDepth(text, what));
  json value = json::parse(text.begin(), text.end(), nullptr, false);
  if (!value.is_discarded()) return value;
  // Only a second, failing pass tells where the error is.
  TANDEM_RETURN_IF_ERROR(ToPythonJson(text, what).status());
  return InvalidArgument("{}: not valid JSON", what);
}

absl::StatusOr<std::string> ToPythonJson(std::string_view text, std::string_view what) {
  TANDEM_RETURN_IF_ERROR(CheckDepth(text, what));
  PythonWriter writer;
  if (!json::sax_parse(text.begin(), text.end(), &writer)) {
    return InvalidArgument("{}: not valid JSON at byte {}: {}", what, writer.position(),
                           writer.error());
  }
  return writer.TakeResult();
}

}  // namespace tandem
