#include "common/text/jinja/builtins.h"

#include <algorithm>
#include <iterator>

#include "common/base/status.h"
#include "common/text/jinja/text_ops.h"

namespace tandem::jinja {
namespace {

constexpr std::string_view kTests[] = {
    "boolean", "callable", "defined",  "divisibleby", "eq",        "equalto", "even",
    "false",   "float",    "ge",       "gt",          "in",        "integer", "iterable",
    "le",      "lower",    "lt",       "mapping",     "ne",        "none",    "number",
    "odd",     "sameas",   "sequence", "string",      "undefined", "true",    "upper"};
constexpr std::string_view kGlobalFunctions[] = {"dict", "namespace", "raise_exception", "range",
                                                 "strftime_now"};
constexpr int64_t kMaxRange = 10000;

bool Listed(const auto& names, std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

absl::StatusOr<bool> Ordered(std::string_view test, const Value& a, const Value& b) {
  int order;
  if (a.IsNumber() && b.IsNumber()) {
    order = a.Number() < b.Number() ? -1 : a.Number() > b.Number() ? 1 : 0;
  } else if (a.text() != nullptr && b.text() != nullptr) {
    order = a.text()->chars().compare(b.text()->chars());
  } else {
    return InvalidArgument("{} and {} have no order", a.KindName(), b.KindName());
  }
  return test == "lt"   ? order < 0
         : test == "le" ? order <= 0
         : test == "gt" ? order > 0
                        : order >= 0;
}

int64_t Clamp(int64_t index, int64_t size, int64_t low, int64_t high) {
  return std::clamp(index < 0 ? index + size : index, low, high);
}

absl::StatusOr<Value> Range(const Call& call) {
  int64_t bounds[3] = {0, 0, 1};
  const size_t n = call.args.size();
  if (n < 1 || n > 3) return InvalidArgument("range takes 1 to 3 integers");
  for (size_t i = 0; i < n; ++i) {
    const int64_t* number = call.args[i].As<int64_t>();
    if (number == nullptr) return InvalidArgument("range takes integers");
    bounds[n == 1 ? 1 : i] = *number;
  }
  const auto [begin, end, step] = bounds;
  if (step == 0) return InvalidArgument("range: the step must not be 0");
  List list;
  for (int64_t i = begin; step > 0 ? i < end : i > end; i += step) {
    if (list.size() == kMaxRange) return InvalidArgument("range is over {} long", kMaxRange);
    list.emplace_back(i);
  }
  return Value(std::move(list));
}

}  // namespace

Value Call::Argument(size_t index, std::string_view keyword) const {
  if (index < args.size()) return args[index];
  for (const auto& [key, value] : kwargs) {
    if (key == keyword) return value;
  }
  return Value();
}

bool IsTest(std::string_view name) { return Listed(kTests, name); }
bool IsGlobalFunction(std::string_view name) { return Listed(kGlobalFunctions, name); }

absl::StatusOr<bool> CallTest(const Call& call) {
  const Value& self = call.self;
  const std::string_view name = call.name;
  const bool sequence = self.text() != nullptr || self.list() != nullptr || self.dict() != nullptr;
  const int64_t* integer = self.As<int64_t>();
  if (name == "defined") return !self.IsUndefined();
  if (name == "undefined") return self.IsUndefined();
  if (name == "none") return self.IsNone();
  if (name == "boolean") return self.As<bool>() != nullptr;
  if (name == "true") return self.As<bool>() != nullptr && self.Truth();
  if (name == "false") return self.As<bool>() != nullptr && !self.Truth();
  if (name == "string") return self.text() != nullptr;
  if (name == "mapping") return self.dict() != nullptr;
  if (name == "iterable") return sequence || self.IsUndefined();
  if (name == "sequence") return sequence || self.IsUndefined();
  if (name == "callable") return self.As<Function>() != nullptr;
  if (name == "number") return self.IsNumber();
  if (name == "integer") return integer != nullptr;
  if (name == "float") return self.As<Float>() != nullptr;
  if (name == "lower") return self.ToText().chars() == Lower(self.ToText()).chars();
  if (name == "upper") return self.ToText().chars() == Upper(self.ToText()).chars();
  const Value other = call.Argument(0, "other");
  if (name == "eq" || name == "equalto" || name == "sameas") return self == other;
  if (name == "ne") return !(self == other);
  if (name == "in") return Contains(other, self);
  if (name == "odd" || name == "even" || name == "divisibleby") {
    const int64_t* by = other.As<int64_t>();
    const int64_t divisor = name == "divisibleby" ? (by == nullptr ? 0 : *by) : 2;
    if (integer == nullptr || divisor == 0) return InvalidArgument("{} takes integers", name);
    return (*integer % divisor == 0) != (name == "odd");
  }
  return Ordered(name, self, other);
}

absl::StatusOr<Value> CallGlobalFunction(const Call& call) {
  if (call.name == "range") return Range(call);
  if (call.name == "raise_exception") {
    return InvalidArgument("{}", call.Argument(0, "message").ToText().chars());
  }
  if (call.name == "strftime_now") {
    const Text format = call.Argument(0, "format").ToText();
    return Value(
        Text(absl::FormatTime(std::string(format.chars()), call.now, absl::LocalTimeZone())));
  }
  Dict dict;
  dict.is_namespace = call.name == "namespace";
  for (const auto& [key, value] : call.kwargs) dict.Set(Text(key), value);
  return Value(std::move(dict));
}

absl::StatusOr<List> Elements(const Value& value) {
  if (const List* list = value.list()) return *list;
  List elements;
  if (const Dict* dict = value.dict()) {
    for (const auto& [key, member] : dict->members) elements.emplace_back(key);
  } else if (const Text* text = value.text()) {
    for (Text& character : Characters(*text)) elements.emplace_back(std::move(character));
  } else if (!value.IsUndefined()) {
    return InvalidArgument("{} cannot be iterated", value.KindName());
  }
  return elements;
}

absl::StatusOr<bool> Contains(const Value& container, const Value& element) {
  if (const List* list = container.list()) {
    return std::find(list->begin(), list->end(), element) != list->end();
  }
  const Text* text = element.text();
  if (Dict* dict = container.dict()) return text != nullptr && dict->Find(text->chars()) != nullptr;
  if (container.text() != nullptr && text != nullptr) {
    return container.text()->chars().find(text->chars()) != std::string_view::npos;
  }
  if (container.IsUndefined()) return false;
  return InvalidArgument("{} cannot be in {}", element.KindName(), container.KindName());
}

Value Item(const Value& value, const Value& index) {
  if (const Text* key = index.text()) {
    Value* found = value.dict() == nullptr ? nullptr : value.dict()->Find(key->chars());
    return found == nullptr ? Value(Undefined{std::string(key->chars())}) : *found;
  }
  const int64_t* number = index.As<int64_t>();
  if (number == nullptr) return Value();
  if (const List* list = value.list()) {
    const int64_t size = static_cast<int64_t>(list->size());
    const int64_t at = *number < 0 ? *number + size : *number;
    if (at >= 0 && at < size) return (*list)[static_cast<size_t>(at)];
  } else if (const Text* text = value.text()) {
    const std::vector<Text> characters = Characters(*text);
    const int64_t size = static_cast<int64_t>(characters.size());
    const int64_t at = *number < 0 ? *number + size : *number;
    if (at >= 0 && at < size) return Value(characters[static_cast<size_t>(at)]);
  }
  return Value(Undefined{fmt::format("[{}]", *number)});
}

absl::StatusOr<Value> Slice(const Value& value, const Value& begin, const Value& end,
                            const Value& step) {
  if (value.list() == nullptr && value.text() == nullptr) {
    return InvalidArgument("{} cannot be sliced", value.KindName());
  }
  TANDEM_ASSIGN_OR_RETURN(const List elements, Elements(value));
  const int64_t size = static_cast<int64_t>(elements.size());
  const int64_t by = step.As<int64_t>() == nullptr ? 1 : *step.As<int64_t>();
  if (by == 0) return InvalidArgument("a slice's step must not be 0");
  const int64_t low = by > 0 ? 0 : -1, high = by > 0 ? size : size - 1;
  const int64_t* first = begin.As<int64_t>();
  const int64_t* last = end.As<int64_t>();
  const int64_t from = first == nullptr ? (by > 0 ? low : high) : Clamp(*first, size, low, high);
  const int64_t to = last == nullptr ? (by > 0 ? high : low) : Clamp(*last, size, low, high);
  List list;
  Text text;
  for (int64_t i = from; by > 0 ? i < to : i > to; i += by) {
    const Value& element = elements[static_cast<size_t>(i)];
    if (value.text() != nullptr) {
      text.Append(*element.text());
    } else {
      list.push_back(element);
    }
  }
  return value.text() != nullptr ? Value(std::move(text)) : Value(std::move(list));
}

}  // namespace tandem::jinja
