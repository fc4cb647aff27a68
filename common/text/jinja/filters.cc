// Filters and methods: builtins.h.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "common/base/status.h"
#include "common/text/jinja/builtins.h"
#include "common/text/jinja/json_value.h"
#include "common/text/jinja/text_ops.h"

namespace tandem::jinja {
namespace {

absl::StatusOr<Value> TextMethod(const Call& call, const Text& self);

int64_t IntegerOr(const Value& value, int64_t fallback) {
  if (const int64_t* integer = value.As<int64_t>()) return *integer;
  return fallback;
}

absl::StatusOr<Value> ToJsonFilter(const Call& call) {
  JsonStyle style;
  style.ensure_ascii = call.Argument(0, "ensure_ascii").Truth();
  style.indent =
      static_cast<int>(std::clamp<int64_t>(IntegerOr(call.Argument(1, "indent"), -1), -1, 16));
  if (style.indent >= 0) style.item_separator = ",";
  const Value separators = call.Argument(2, "separators");
  if (separators.list() != nullptr && separators.list()->size() == 2) {
    style.item_separator = std::string((*separators.list())[0].ToText().chars());
    style.key_separator = std::string((*separators.list())[1].ToText().chars());
  }
  style.sort_keys = call.Argument(3, "sort_keys").Truth();
  TANDEM_ASSIGN_OR_RETURN(Text json, ToJson(call.self, style));
  return Value(std::move(json));
}

absl::StatusOr<Value> FromJsonFilter(const Call& call) {
  return FromJson(call.self.ToText().chars(), "from_json");
}

absl::StatusOr<Value> Length(const Call& call) {
  if (call.self.text() != nullptr) {
    return Value(static_cast<int64_t>(CharacterOffsets(call.self.text()->chars()).size() - 1));
  }
  TANDEM_ASSIGN_OR_RETURN(const List elements, Elements(call.self));
  return Value(static_cast<int64_t>(elements.size()));
}

Value Items(const Dict& dict) {
  List items;
  for (const auto& [key, value] : dict.members) items.emplace_back(List{Value(key), value});
  return Value(std::move(items));
}

absl::StatusOr<Value> ItemsFilter(const Call& call) {
  if (call.self.IsUndefined()) return Value(List{});
  const Dict* dict = call.self.dict();
  if (dict == nullptr) return InvalidArgument("{} takes a dictionary", call.name);
  if (call.name == "items") return Items(*dict);
  Dict sorted = *dict;
  std::sort(sorted.members.begin(), sorted.members.end(), [](const auto& a, const auto& b) {
    return Lower(a.first).chars() < Lower(b.first).chars();
  });
  return Items(sorted);
}

absl::StatusOr<Value> Join(const Call& call) {
  TANDEM_ASSIGN_OR_RETURN(const List elements, Elements(call.self));
  const Text separator = call.Argument(0, "d").ToText();
  const Value attribute = call.Argument(1, "attribute");
  Text joined;
  for (size_t i = 0; i < elements.size(); ++i) {
    if (joined.size() > kMaxTextBytes) return InvalidArgument("join: the text grows too long");
    if (i > 0) joined.Append(separator);
    joined.Append((attribute.IsUndefined() ? elements[i] : Item(elements[i], attribute)).ToText());
  }
  return Value(std::move(joined));
}

absl::StatusOr<Value> Number(const Call& call) {
  const bool integer = call.name == "int";
  double value = call.self.Number();
  if (const Text* text = call.self.text()) {
    const std::string chars(text->chars());
    char* end = nullptr;
    value = std::strtod(chars.c_str(), &end);
    if (end == chars.c_str() || *end != '\0') value = call.Argument(0, "default").Number();
  }
  if (!integer) return Value(Float{value, ""});
  if (!(std::abs(value) < 9e18)) return InvalidArgument("int: the number is too large");
  return Value(static_cast<int64_t>(value));
}

// Whether `element` passes a select or reject filter, whose test's name begins the arguments.
absl::StatusOr<bool> Passes(const Call& call, const Value& element, size_t test_at) {
  if (call.args.size() <= test_at) return element.Truth();
  const Text test = call.args[test_at].ToText();
  const std::string_view symbols[][2] = {{"==", "eq"}, {"!=", "ne"}, {"<", "lt"},
                                         {"<=", "le"}, {">", "gt"},  {">=", "ge"}};
  std::string_view name = test.chars();
  for (const auto& [symbol, meaning] : symbols) {
    if (name == symbol) name = meaning;
  }
  if (!IsTest(name)) return InvalidArgument("the test \"{}\" is not supported", name);
  const auto rest = call.args.begin() + static_cast<ptrdiff_t>(test_at) + 1;
  return CallTest({name, element, {rest, call.args.end()}, {}, call.now});
}

absl::StatusOr<Value> SelectFilter(const Call& call) {
  const bool by_attribute = call.name.ends_with("attr");
  const bool wanted = call.name.starts_with("select");
  if (!call.self.Truth()) return Value(List{});  // None too
  TANDEM_ASSIGN_OR_RETURN(const List elements, Elements(call.self));
  List kept;
  for (const Value& element : elements) {
    const Value tested = by_attribute ? Item(element, call.Argument(0, "attr")) : element;
    TANDEM_ASSIGN_OR_RETURN(const bool passes, Passes(call, tested, by_attribute ? 1 : 0));
    if (passes == wanted) kept.push_back(element);
  }
  return Value(std::move(kept));
}

absl::StatusOr<Value> MapFilter(const Call& call) {
  if (!call.self.Truth()) return Value(List{});  // None too
  TANDEM_ASSIGN_OR_RETURN(const List elements, Elements(call.self));
  const Value attribute = call.Argument(SIZE_MAX, "attribute");
  const Text filter = call.Argument(0, "filter").ToText();
  if (attribute.IsUndefined() && !IsFilter(filter.chars())) {
    return InvalidArgument("map: the filter \"{}\" is not supported", filter.chars());
  }
  List mapped;
  for (const Value& element : elements) {
    if (!attribute.IsUndefined()) {
      mapped.push_back(Item(element, attribute));
      continue;
    }
    std::vector<Value> args(call.args.begin() + 1, call.args.end());
    TANDEM_ASSIGN_OR_RETURN(
        Value value, CallFilter({filter.chars(), element, std::move(args), call.kwargs, call.now}));
    mapped.push_back(std::move(value));
  }
  return Value(std::move(mapped));
}

// first, last, list, reverse, unique, sort, min, max.
absl::StatusOr<Value> ListFilter(const Call& call) {
  TANDEM_ASSIGN_OR_RETURN(List elements, Elements(call.self));
  const std::string_view name = call.name;
  if (name == "first") return elements.empty() ? Value() : elements.front();
  if (name == "last") return elements.empty() ? Value() : elements.back();
  if (name == "reverse") std::reverse(elements.begin(), elements.end());
  if (name == "unique") {
    List unique;
    for (const Value& element : elements) {
      if (std::find(unique.begin(), unique.end(), element) == unique.end()) {
        unique.push_back(element);
      }
    }
    elements = std::move(unique);
  }
  if (name == "sort" || name == "min" || name == "max") {
    absl::Status status;
    std::stable_sort(elements.begin(), elements.end(), [&](const Value& a, const Value& b) {
      const absl::StatusOr<bool> less = CallTest({"lt", a, {b}, {}, call.now});
      status.Update(less.status());
      return less.ok() && *less;
    });
    if (!status.ok()) return status;
    if (name == "min") return elements.empty() ? Value() : elements.front();
    if (name == "max") return elements.empty() ? Value() : elements.back();
  }
  return Value(std::move(elements));
}

absl::StatusOr<Value> DefaultFilter(const Call& call) {
  const bool also_false = call.Argument(1, "boolean").Truth();
  const bool missing = call.self.IsUndefined() || (also_false && !call.self.Truth());
  return missing ? call.Argument(0, "default_value") : call.self;
}

absl::StatusOr<Value> StringFilter(const Call& call) { return Value(call.self.ToText()); }

absl::StatusOr<Value> AbsFilter(const Call& call) {
  if (const int64_t* integer = call.self.As<int64_t>()) return Value(std::abs(*integer));
  return Value(Float{std::abs(call.self.Number()), ""});
}

absl::StatusOr<Value> IndentFilter(const Call& call) {
  const auto width =
      static_cast<size_t>(std::clamp<int64_t>(IntegerOr(call.Argument(0, "width"), 4), 0, 100));
  const bool first = call.Argument(1, "first").Truth();
  const Text blanks(std::string(width, ' '));
  Text out;
  size_t line = 0;
  for (const Text& part : Split(call.self.ToText(), "\n", -1, false)) {
    if (line > 0) out.Append(Text("\n"));
    if ((line > 0 || first) && !part.empty()) out.Append(blanks);
    out.Append(part);
    ++line;
  }
  return Value(std::move(out));
}

// Filters that are methods of a string.
absl::StatusOr<Value> TextFilter(const Call& call) { return TextMethod(call, call.self.ToText()); }

struct Filter {
  std::string_view name;
  absl::StatusOr<Value> (*apply)(const Call&);
};
constexpr Filter kFilters[] = {
    {"abs", AbsFilter},
    {"capitalize", TextFilter},
    {"count", Length},
    {"d", DefaultFilter},
    {"default", DefaultFilter},
    {"dictsort", ItemsFilter},
    {"first", ListFilter},
    {"float", Number},
    {"indent", IndentFilter},
    {"from_json", FromJsonFilter},
    {"int", Number},
    {"items", ItemsFilter},
    {"join", Join},
    {"last", ListFilter},
    {"length", Length},
    {"list", ListFilter},
    {"lower", TextFilter},
    {"map", MapFilter},
    {"max", ListFilter},
    {"min", ListFilter},
    {"reject", SelectFilter},
    {"rejectattr", SelectFilter},
    {"replace", TextFilter},
    {"reverse", ListFilter},
    {"safe", StringFilter},
    {"select", SelectFilter},
    {"selectattr", SelectFilter},
    {"sort", ListFilter},
    {"string", StringFilter},
    {"title", TextFilter},
    {"tojson", ToJsonFilter},
    {"trim", TextFilter},
    {"unique", ListFilter},
    {"upper", TextFilter},
};

Value ToList(std::vector<Text> texts) {
  List list;
  for (Text& text : texts) list.emplace_back(std::move(text));
  return Value(std::move(list));
}

// Whether any of one text, or of a tuple of texts, begins or ends `self`.
bool AnyAffix(std::string_view self, const Value& affix, bool at_start) {
  const List one = {affix};
  for (const Value& value : affix.list() == nullptr ? one : *affix.list()) {
    const Text text = value.ToText();
    if (at_start ? self.starts_with(text.chars()) : self.ends_with(text.chars())) return true;
  }
  return false;
}

absl::StatusOr<Value> TextMethod(const Call& call, const Text& self) {
  const std::string_view name = call.name;
  const Value first = call.Argument(0, "sep");
  const Text argument = first.IsNone() ? Text() : first.ToText();
  const auto at_most = [&](size_t index, std::string_view keyword) {
    return IntegerOr(call.Argument(index, keyword), -1);
  };
  if (name == "strip" || name == "trim") return Value(Strip(self, argument.chars(), true, true));
  if (name == "lstrip") return Value(Strip(self, argument.chars(), true, false));
  if (name == "rstrip") return Value(Strip(self, argument.chars(), false, true));
  if (name == "split" || name == "rsplit") {
    return ToList(Split(self, argument.chars(), at_most(1, "maxsplit"), name == "rsplit"));
  }
  if (name == "splitlines") return ToList(Split(self, "\n", -1, false));
  if (name == "startswith") return Value(AnyAffix(self.chars(), first, true));
  if (name == "endswith") return Value(AnyAffix(self.chars(), first, false));
  if (name == "replace") {
    return Value(
        Replace(self, argument.chars(), call.Argument(1, "new").ToText(), at_most(2, "count")));
  }
  if (name == "upper") return Value(Upper(self));
  if (name == "lower") return Value(Lower(self));
  if (name == "capitalize") return Value(Capitalize(self));
  if (name == "title") return Value(Title(self));
  if (name == "removeprefix") {
    const bool has = self.chars().starts_with(argument.chars());
    return Value(self.Sub(has ? argument.size() : 0, self.size()));
  }
  if (name == "removesuffix") {
    const bool has = self.chars().ends_with(argument.chars());
    return Value(self.Sub(0, self.size() - (has ? argument.size() : 0)));
  }
  if (name == "join") return Join({"join", first, {Value(self)}, {}, call.now});
  if (name == "find" || name == "index") {
    const size_t at = self.chars().find(argument.chars());
    if (at == std::string_view::npos) return Value(int64_t{-1});
    return Value(static_cast<int64_t>(CharacterOffsets(self.chars().substr(0, at)).size() - 1));
  }
  if (name == "count") {
    return Value(static_cast<int64_t>(Split(self, argument.chars(), -1, false).size() - 1));
  }
  if (name == "isdigit") {
    return Value(!self.empty() &&
                 self.chars().find_first_not_of("0123456789") == std::string_view::npos);
  }
  return InvalidArgument("strings have no method \"{}\" here", name);
}

absl::StatusOr<Value> DictMethod(const Call& call, Dict* self) {
  if (call.name == "items") return Items(*self);
  List list;
  for (const auto& [key, value] : self->members) {
    list.push_back(call.name == "keys" ? Value(key) : value);
  }
  if (call.name == "keys" || call.name == "values") return Value(std::move(list));
  if (call.name == "get") {
    const Value* found = self->Find(call.Argument(0, "key").ToText().chars());
    if (found != nullptr) return *found;
    const Value fallback = call.Argument(1, "default");
    return fallback.IsUndefined() ? Value(None{}) : fallback;
  }
  return InvalidArgument("dictionaries have no method \"{}\" here", call.name);
}

}  // namespace

bool IsFilter(std::string_view name) {
  return std::any_of(std::begin(kFilters), std::end(kFilters),
                     [name](const Filter& filter) { return filter.name == name; });
}

absl::StatusOr<Value> CallFilter(const Call& call) {
  for (const Filter& filter : kFilters) {
    if (filter.name == call.name) return filter.apply(call);
  }
  return InvalidArgument("the filter \"{}\" is not supported", call.name);
}

absl::StatusOr<Value> CallMethod(const Call& call) {
  if (const Text* text = call.self.text()) return TextMethod(call, *text);
  if (Dict* dict = call.self.dict()) return DictMethod(call, dict);
  return InvalidArgument("{} has no method \"{}\"", call.self.KindName(), call.name);
}

}  // namespace tandem::jinja
