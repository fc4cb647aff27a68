#include "common/text/jinja/json_value.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

#include "common/base/status.h"
#include "common/text/json.h"
#include "common/text/utf8.h"

namespace tandem::jinja {
namespace {

using nlohmann::json;

// Builds values from what nlohmann's parser reports of a text that ToPythonJson has accepted.
class Builder {
 public:
  bool null() { return Add(Value(None{})); }
  bool boolean(bool value) { return Add(Value(value)); }
  bool number_integer(int64_t value) { return Add(Value(value)); }
  bool number_unsigned(uint64_t value) {
    if (value <= INT64_MAX) return Add(Value(static_cast<int64_t>(value)));
    return Add(Value(Float{static_cast<double>(value), std::to_string(value)}));
  }
  bool number_float(double value, const std::string& spelling) {
    const bool is_integer = spelling.find_first_of(".eE") == std::string::npos;
    return Add(Value(Float{value, is_integer ? spelling : PythonFloat(value)}));
  }
  bool string(std::string& value) { return Add(Value(Text(value, true))); }
  bool binary(json::binary_t&) { return false; }
  bool start_object(size_t) { return Open(Value(Dict{})); }
  bool key(std::string& name) {
    keys_.back() = Text(name, true);
    return true;
  }
  bool end_object() { return Close(); }
  bool start_array(size_t) { return Open(Value(List{})); }
  bool end_array() { return Close(); }
  bool parse_error(size_t, const std::string&, const json::exception&) { return false; }

  Value Take() { return std::move(result_); }

 private:
  bool Open(Value container) {
    open_.push_back(std::move(container));
    keys_.emplace_back();
    return true;
  }
  bool Close() {
    Value done = std::move(open_.back());
    open_.pop_back();
    keys_.pop_back();
    return Add(std::move(done));
  }
  bool Add(Value value) {
    if (open_.empty()) {
      result_ = std::move(value);
    } else if (List* list = open_.back().list()) {
      list->push_back(std::move(value));
    } else {
      open_.back().dict()->Set(keys_.back(), std::move(value));
    }
    return true;
  }

  std::vector<Value> open_;
  std::vector<Text> keys_;  // of each open object, the one read last
  Value result_;
};

class Writer {
 public:
  explicit Writer(const JsonStyle& style) : style_(style) {}

  absl::Status Write(const Value& value, int level) {
    if (out_.size() > kMaxTextBytes) return InvalidArgument("tojson: the text grows too long");
    if (const Text* text = value.text()) {
      WriteText(text->chars());
    } else if (const bool* boolean = value.As<bool>()) {
      out_ += *boolean ? "true" : "false";
    } else if (value.IsNone()) {
      out_ += "null";
    } else if (value.IsNumber()) {
      out_ += value.ToText().chars();
    } else if (const List* list = value.list()) {
      return WriteList(*list, level);
    } else if (const Dict* dict = value.dict()) {
      return WriteDict(*dict, level);
    } else {
      return InvalidArgument("tojson: {} cannot be shown as JSON", value.KindName());
    }
    return absl::OkStatus();
  }
  std::string Take() { return std::move(out_); }

 private:
  void WriteText(std::string_view text) {
    const size_t begin = out_.size();
    AppendJsonString(text, &out_);
    if (!style_.ensure_ascii) return;
    const std::string quoted = out_.substr(begin);
    out_.resize(begin);
    for (size_t pos = 0; pos < quoted.size();) {
      const uint32_t c = NextCodePoint(quoted, &pos);
      if (c < 0x7F) {
        out_.push_back(static_cast<char>(c));
      } else if (c < 0x10000) {
        out_ += fmt::format("\\u{:04x}", c);
      } else {
        out_ += fmt::format("\\u{:04x}\\u{:04x}", 0xD7C0 + (c >> 10), 0xDC00 + (c & 0x3FF));
      }
    }
  }

  void NewLine(int level) {
    if (style_.indent < 0) return;
    out_.push_back('\n');
    out_.append(static_cast<size_t>(style_.indent * level), ' ');
  }

  absl::Status WriteList(const List& list, int level) {
    out_.push_back('[');
    for (size_t i = 0; i < list.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      NewLine(level + 1);
      TANDEM_RETURN_IF_ERROR(Write(list[i], level + 1));
    }
    if (!list.empty()) NewLine(level);
    out_.push_back(']');
    return absl::OkStatus();
  }

  absl::Status WriteDict(const Dict& dict, int level) {
    std::vector<const std::pair<Text, Value>*> members;
    for (const auto& member : dict.members) members.push_back(&member);
    if (style_.sort_keys) {
      std::sort(members.begin(), members.end(),
                [](const auto* a, const auto* b) { return a->first.chars() < b->first.chars(); });
    }
    out_.push_back('{');
    for (size_t i = 0; i < members.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      NewLine(level + 1);
      WriteText(members[i]->first.chars());
      out_ += style_.key_separator;
      TANDEM_RETURN_IF_ERROR(Write(members[i]->second, level + 1));
    }
    if (!members.empty()) NewLine(level);
    out_.push_back('}');
    return absl::OkStatus();
  }

  const JsonStyle& style_;
  std::string out_;
};

}  // namespace

absl::StatusOr<Value> FromJson(std::string_view text, std::string_view what) {
  TANDEM_RETURN_IF_ERROR(ToPythonJson(text, what).status());
  Builder builder;
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return InvalidArgument("{}: not valid JSON", what);
  }
  return builder.Take();
}

absl::StatusOr<Text> ToJson(const Value& value, const JsonStyle& style) {
  Writer writer(style);
  TANDEM_RETURN_IF_ERROR(writer.Write(value, 0));
  return Text(writer.Take(), /*data=*/true);
}

}  // namespace tandem::jinja
