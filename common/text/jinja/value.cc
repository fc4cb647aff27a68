#include "common/text/jinja/value.h"

#include <algorithm>

#include "fmt/format.h"

#include "common/text/json.h"

namespace tandem::jinja {

Text Text::Sub(size_t begin, size_t end) const {
  Text part;
  part.chars_ = chars_.substr(begin, end - begin);
  part.marks_ = marks_.substr(begin, end - begin);
  return part;
}

Text Text::WithChars(std::string chars) const {
  Text other = *this;
  other.chars_ = std::move(chars);
  other.marks_.resize(other.chars_.size(), marks_.empty() ? '\0' : marks_.back());
  return other;
}

namespace {

// A string's characters as repr() shows them: control characters and the quote escaped.
void AppendEscaped(const Text& text, char quote, Text* out) {
  size_t shown = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text.chars()[i];
    if (c != quote && c != '\\' && c != 0x7F && (static_cast<unsigned char>(c) >= 0x20)) continue;
    const std::string escape = c == '\n'                 ? "\\n"
                               : c == '\r'               ? "\\r"
                               : c == '\t'               ? "\\t"
                               : c == quote || c == '\\' ? std::string{'\\', c}
                                                         : fmt::format("\\x{:02x}", c);
    out->Append(text.Sub(shown, i));
    out->Append(Text(escape, text.IsData(i)));
    shown = i + 1;
  }
  out->Append(text.Sub(shown, text.size()));
}

}  // namespace

Value::Value(List list) : data_(Undefined{"a list that nests too deeply"}) {
  int nesting = 1;
  for (const Value& element : list) nesting = std::max(nesting, element.Nesting() + 1);
  if (nesting > kMaxNesting) return;
  data_ = std::make_shared<NestedList>(NestedList{std::move(list), nesting});
}

Value::Value(Dict dict) : data_(Undefined{"a dictionary that nests too deeply"}) {
  for (const auto& [key, value] : dict.members) {
    dict.nesting = std::max(dict.nesting, value.Nesting() + 1);
  }
  if (dict.nesting > kMaxNesting) return;
  data_ = std::make_shared<Dict>(std::move(dict));
}

int Value::Nesting() const {
  if (const auto* list = As<std::shared_ptr<NestedList>>()) return (*list)->nesting;
  if (const Dict* value = dict()) return value->is_namespace ? kMaxNesting : value->nesting;
  return 0;
}

const Text* Value::text() const {
  const auto* text = As<std::shared_ptr<const Text>>();
  return text == nullptr ? nullptr : text->get();
}
List* Value::list() const {
  const auto* list = As<std::shared_ptr<NestedList>>();
  return list == nullptr ? nullptr : &(*list)->elements;
}
Dict* Value::dict() const {
  const auto* dict = As<std::shared_ptr<Dict>>();
  return dict == nullptr ? nullptr : dict->get();
}

bool Value::IsNumber() const { return As<bool>() || As<int64_t>() || As<Float>(); }

double Value::Number() const {
  if (const bool* value = As<bool>()) return *value ? 1 : 0;
  if (const int64_t* value = As<int64_t>()) return static_cast<double>(*value);
  const Float* value = As<Float>();
  return value == nullptr ? 0 : value->value;
}

bool Value::Truth() const {
  if (IsNumber()) return Number() != 0;
  if (const Text* value = text()) return !value->empty();
  if (const List* value = list()) return !value->empty();
  if (const Dict* value = dict()) return !value->members.empty();
  return As<Function>() != nullptr;
}

bool Value::operator==(const Value& other) const {
  if (IsNumber() && other.IsNumber()) return Number() == other.Number();
  if (data_.index() != other.data_.index()) return false;
  if (const Text* value = text()) return value->chars() == other.text()->chars();
  if (const List* value = list()) return *value == *other.list();
  if (const Dict* value = dict()) {
    Dict* theirs = other.dict();
    if (value->members.size() != theirs->members.size()) return false;
    for (const auto& [key, member] : value->members) {
      const Value* found = theirs->Find(key.chars());
      if (found == nullptr || !(*found == member)) return false;
    }
    return true;
  }
  if (const Function* value = As<Function>()) return value->name == other.As<Function>()->name;
  return true;  // both undefined or both None
}

Text Value::ToText() const {
  if (const Text* value = text()) return *value;
  if (IsUndefined()) return Text();
  Text out;
  AppendRepr(&out);
  return out;
}

void Value::AppendRepr(Text* out) const {
  if (out->size() > kMaxTextBytes) return;
  const auto plain = [out](std::string_view chars) { out->Append(Text(chars)); };
  if (const bool* value = As<bool>()) return plain(*value ? "True" : "False");
  if (const int64_t* value = As<int64_t>()) return plain(std::to_string(*value));
  if (const Float* value = As<Float>()) {
    return plain(value->spelling.empty() ? PythonFloat(value->value) : value->spelling);
  }
  if (IsNone()) return plain("None");
  if (const Text* value = text()) {
    const bool has_single = value->chars().find('\'') != std::string_view::npos;
    const bool has_double = value->chars().find('"') != std::string_view::npos;
    const char quote = has_single && !has_double ? '"' : '\'';
    plain(std::string_view(&quote, 1));
    AppendEscaped(*value, quote, out);
    return plain(std::string_view(&quote, 1));
  }
  std::string_view comma;
  if (const List* value = list()) {
    plain("[");
    for (const Value& element : *value) {
      plain(std::exchange(comma, ", "));
      element.AppendRepr(out);
    }
    return plain("]");
  }
  if (const Dict* value = dict()) {
    plain("{");
    for (const auto& [key, member] : value->members) {
      plain(std::exchange(comma, ", "));
      Value(key).AppendRepr(out);
      plain(": ");
      member.AppendRepr(out);
    }
    plain("}");
  }
}

std::string_view Value::KindName() const {
  constexpr std::string_view kNames[] = {"undefined",  "None",         "a boolean",
                                         "an integer", "a float",      "a string",
                                         "a list",     "a dictionary", "a function"};
  return kNames[data_.index()];
}

Value* Dict::Find(std::string_view key) {
  for (auto& [name, value] : members) {
    if (name.chars() == key) return &value;
  }
  return nullptr;
}

void Dict::Set(Text key, Value value) {
  if (Value* found = Find(key.chars())) {
    *found = std::move(value);
  } else {
    members.emplace_back(std::move(key), std::move(value));
  }
}

}  // namespace tandem::jinja
