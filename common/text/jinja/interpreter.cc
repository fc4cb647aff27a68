#include "common/text/jinja/interpreter.h"

#include <cmath>
#include <utility>

#include "common/base/status.h"

namespace tandem::jinja {
namespace {

constexpr int64_t kMaxSteps = 1'000'000;
constexpr int64_t kStepsOfTurn = 5;  // what a loop costs beside its body
constexpr int kMaxCalls = 50;

}  // namespace

Interpreter::Interpreter(const Dict& variables, absl::Time now) : now_(now) {
  scopes_.emplace_back();
  for (const auto& [name, value] : variables.members) {
    scopes_.back().emplace(name.chars(), value);
  }
}

absl::StatusOr<Text> Interpreter::Run(const Body& body) {
  Text out = Capture(body);
  if (!status_.ok()) return status_;
  return out;
}

void Interpreter::Fail(int line, std::string_view what) {
  if (status_.ok()) status_ = InvalidArgument("line {}: {}", line, what);
}

template <class T>
T Interpreter::Unwrap(int line, absl::StatusOr<T> result, T fallback) {
  if (result.ok()) return *std::move(result);
  Fail(line, MessageOf(result.status()));
  return fallback;
}

void Interpreter::CountStep(int line) {
  if (++steps_ > kMaxSteps && status_.ok()) {
    status_ = ResourceExhausted("line {}: the template takes over {} steps", line, kMaxSteps);
  }
}

Text Interpreter::Capture(const Body& body) {
  Text captured;
  Text* const outer = std::exchange(out_, &captured);
  RunBody(body);
  out_ = outer;
  return captured;
}

Interpreter::Flow Interpreter::RunBody(const Body& body) {
  for (const auto& statement : body) {
    if (!ok()) break;
    const Flow flow = RunStatement(*statement);
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::RunStatement(const Stmt& statement) {
  CountStep(statement.line);
  switch (statement.kind) {
    case Stmt::Kind::kText:
      out_->Append(statement.text);
      break;
    case Stmt::Kind::kOutput:
      out_->Append(Eval(*statement.expr).ToText());
      break;
    case Stmt::Kind::kIf:
      return RunBody(Eval(*statement.expr).Truth() ? statement.body : statement.otherwise);
    case Stmt::Kind::kFor:
      return RunFor(statement);
    case Stmt::Kind::kSet:
      RunSet(statement);
      break;
    case Stmt::Kind::kSetBlock:
      Bind(statement.targets, Value(Capture(statement.body)), statement.line);
      break;
    case Stmt::Kind::kMacro:
      scopes_.back()[statement.macro.name] =
          Value(Value::Data(Function{statement.macro.name, &statement.macro}));
      break;
    case Stmt::Kind::kGroup:
      return RunBody(statement.body);
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  if (out_->size() > kMaxTextBytes) Fail(statement.line, "the template prints too much");
  return Flow::kNext;
}

Interpreter::Flow Interpreter::RunFor(const Stmt& statement) {
  List elements = Unwrap(statement.line, Elements(Eval(*statement.expr)), List());
  if (statement.condition != nullptr) {
    List kept;
    for (const Value& element : elements) {
      scopes_.emplace_back();
      Bind(statement.targets, element, statement.line);
      if (Eval(*statement.condition).Truth()) kept.push_back(element);
      scopes_.pop_back();
    }
    elements = std::move(kept);
  }
  if (elements.empty()) return RunBody(statement.otherwise);
  steps_ += kStepsOfTurn * static_cast<int64_t>(elements.size());
  for (size_t i = 0; i < elements.size() && ok(); ++i) {
    CountStep(statement.line);
    // What a turn sets is gone with it: only namespaces carry values out of a loop.
    scopes_.emplace_back();
    Bind(statement.targets, elements[i], statement.line);
    scopes_.back()["loop"] = LoopValue(elements, i);
    const Flow flow = RunBody(statement.body);
    scopes_.pop_back();
    if (flow == Flow::kBreak) break;
  }
  return Flow::kNext;
}

Value Interpreter::LoopValue(const List& elements, size_t index) const {
  const auto at = static_cast<int64_t>(index), length = static_cast<int64_t>(elements.size());
  Dict loop;
  loop.members = {
      {Text("index"), Value(at + 1)},         {Text("index0"), Value(at)},
      {Text("revindex"), Value(length - at)}, {Text("revindex0"), Value(length - at - 1)},
      {Text("first"), Value(at == 0)},        {Text("last"), Value(at + 1 == length)},
      {Text("length"), Value(length)}};
  if (index > 0) loop.members.emplace_back(Text("previtem"), elements[index - 1]);
  if (index + 1 < elements.size()) {
    loop.members.emplace_back(Text("nextitem"), elements[index + 1]);
  }
  return Value(std::move(loop));
}

void Interpreter::RunSet(const Stmt& statement) {
  const Value value = Eval(*statement.expr);
  if (statement.attribute.empty()) return Bind(statement.targets, value, statement.line);
  Dict* dict = Lookup(statement.targets[0]).dict();
  if (dict == nullptr || !dict->is_namespace) {
    return Fail(statement.line, fmt::format("{} is no namespace", statement.targets[0]));
  }
  if (value.dict() != nullptr && value.dict()->is_namespace) {
    return Fail(statement.line, "a namespace cannot be part of another value");
  }
  dict->Set(Text(statement.attribute), value);
}

void Interpreter::Bind(const std::vector<std::string>& targets, const Value& value, int line) {
  if (targets.size() == 1) {
    scopes_.back()[targets[0]] = value;
    return;
  }
  const List* list = value.list();
  if (list == nullptr || list->size() != targets.size()) {
    return Fail(
        line, fmt::format("{} cannot be unpacked into {} names", value.KindName(), targets.size()));
  }
  for (size_t i = 0; i < targets.size(); ++i) scopes_.back()[targets[i]] = (*list)[i];
}

Value Interpreter::Lookup(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto it = scope->find(name); it != scope->end()) return it->second;
  }
  if (IsGlobalFunction(name)) return Value(Value::Data(Function{name}));
  return Value(Value::Data(Undefined{name}));
}

Value Interpreter::EvalOr(const ExprPtr& expr) { return expr == nullptr ? Value() : Eval(*expr); }

Value Interpreter::Eval(const Expr& expr) {
  CountStep(expr.line);
  if (!ok()) return Value();
  switch (expr.kind) {
    case Expr::Kind::kConstant:
      return expr.constant;
    case Expr::Kind::kName:
      return Lookup(expr.name);
    case Expr::Kind::kList: {
      List list;
      for (const ExprPtr& arg : expr.args) list.push_back(Eval(*arg));
      return Value(std::move(list));
    }
    case Expr::Kind::kDict: {
      Dict dict;
      for (size_t i = 0; i < expr.args.size(); i += 2) {
        dict.Set(Eval(*expr.args[i]).ToText(), Eval(*expr.args[i + 1]));
      }
      return Value(std::move(dict));
    }
    case Expr::Kind::kAttribute:
    case Expr::Kind::kItem:
    case Expr::Kind::kSlice:
      return EvalMember(expr);
    case Expr::Kind::kCall:
      return EvalCall(expr);
    case Expr::Kind::kFilter: {
      const Call call = MakeCall(expr, expr.name, Eval(*expr.args[0]));
      return ok() ? Unwrap(expr.line, CallFilter(call), Value()) : Value();
    }
    case Expr::Kind::kTest: {
      const Call call = MakeCall(expr, expr.name, Eval(*expr.args[0]));
      return Value(ok() && Unwrap(expr.line, CallTest(call), false));
    }
    case Expr::Kind::kNot:
      return Value(!Eval(*expr.args[0]).Truth());
    case Expr::Kind::kNegative: {
      const Value value = Eval(*expr.args[0]);
      if (const int64_t* integer = value.As<int64_t>()) return Value(-*integer);
      if (!value.IsNumber()) Fail(expr.line, fmt::format("-: {} is no number", value.KindName()));
      return Value(Value::Data(Float{-value.Number(), ""}));
    }
    case Expr::Kind::kBinary:
      return EvalBinary(expr);
    case Expr::Kind::kConditional:
      return Eval(*expr.args[1]).Truth() ? Eval(*expr.args[0]) : EvalOr(expr.args[2]);
  }
  return Value();
}

Value Interpreter::EvalBinary(const Expr& expr) {
  const std::string& name = expr.name;
  const Value a = Eval(*expr.args[0]);
  if (name == "and") return a.Truth() ? Eval(*expr.args[1]) : a;
  if (name == "or") return a.Truth() ? a : Eval(*expr.args[1]);
  const Value b = Eval(*expr.args[1]);
  if (!ok()) return Value();
  if (name == "==") return Value(a == b);
  if (name == "!=") return Value(!(a == b));
  if (name == "in") return Value(Unwrap(expr.line, Contains(b, a), false));
  if (name == "not in") return Value(!Unwrap(expr.line, Contains(b, a), false));
  if (name == "+") return Add(expr, a, b);
  if (name == "~") return Add(expr, Value(a.ToText()), Value(b.ToText()));
  const std::string_view order = name == "<"    ? "lt"
                                 : name == "<=" ? "le"
                                 : name == ">"  ? "gt"
                                 : name == ">=" ? "ge"
                                                : "";
  if (order.empty()) return Arithmetic(expr, a, b);
  return Value(Unwrap(expr.line, CallTest({order, a, {b}, {}, now_}), false));
}

Value Interpreter::Add(const Expr& expr, const Value& a, const Value& b) {
  if (a.text() != nullptr && b.text() != nullptr) {
    if (a.text()->size() + b.text()->size() > kMaxTextBytes) {
      Fail(expr.line, "a text grows too long");
      return Value();
    }
    Text text = *a.text();
    text.Append(*b.text());
    return Value(std::move(text));
  }
  if (a.list() != nullptr && b.list() != nullptr) {
    if (a.list()->size() + b.list()->size() > kMaxListLength) {
      Fail(expr.line, "a list grows too long");
      return Value();
    }
    steps_ += static_cast<int64_t>(a.list()->size() + b.list()->size()) / 10;
    List list = *a.list();
    list.insert(list.end(), b.list()->begin(), b.list()->end());
    return Value(std::move(list));
  }
  return Arithmetic(expr, a, b);
}

Value Interpreter::Arithmetic(const Expr& expr, const Value& a, const Value& b) {
  const std::string& name = expr.name;
  if (!a.IsNumber() || !b.IsNumber()) {
    const auto* missing = a.As<Undefined>() != nullptr ? a.As<Undefined>() : b.As<Undefined>();
    Fail(expr.line, missing != nullptr ? fmt::format("\"{}\" is undefined", missing->name)
                                       : fmt::format("{} of {} and {} is not supported", name,
                                                     a.KindName(), b.KindName()));
    return Value();
  }
  const double x = a.Number(), y = b.Number();
  if (y == 0 && (name == "/" || name == "//" || name == "%")) {
    Fail(expr.line, "division by zero");
    return Value();
  }
  double result = 0;
  if (name == "+") result = x + y;
  if (name == "-") result = x - y;
  if (name == "*") result = x * y;
  if (name == "/") result = x / y;
  if (name == "//") result = std::floor(x / y);
  if (name == "%") result = x - y * std::floor(x / y);
  if (name == "**") result = std::pow(x, y);
  const bool integers = a.As<Float>() == nullptr && b.As<Float>() == nullptr && name != "/";
  if (integers && std::abs(result) < 0x1p53 && result == std::floor(result)) {
    return Value(static_cast<int64_t>(result));
  }
  return Value(Value::Data(Float{result, ""}));
}

// a.b, a[b] and a[b:c:d].
Value Interpreter::EvalMember(const Expr& expr) {
  const Value self = Eval(*expr.args[0]);
  if (const auto* missing = self.As<Undefined>()) {
    Fail(expr.line, fmt::format("\"{}\" is undefined", missing->name));
    return Value();
  }
  if (expr.kind == Expr::Kind::kItem) return Item(self, Eval(*expr.args[1]));
  if (expr.kind == Expr::Kind::kAttribute) {
    const bool is_number = expr.name.find_first_not_of("0123456789") == std::string::npos;
    return Item(self, is_number && expr.name.size() < 10 ? Value(int64_t{std::stoi(expr.name)})
                                                         : Value(Text(expr.name)));
  }
  const Value begin = EvalOr(expr.args[1]), end = EvalOr(expr.args[2]), step = EvalOr(expr.args[3]);
  return Unwrap(expr.line, Slice(self, begin, end, step), Value());
}

Call Interpreter::MakeCall(const Expr& expr, std::string_view name, Value self) {
  Call call{name, std::move(self), {}, {}, now_};
  for (size_t i = 1; i < expr.args.size(); ++i) call.args.push_back(Eval(*expr.args[i]));
  for (const auto& [key, value] : expr.kwargs) call.kwargs.emplace_back(key, Eval(*value));
  return call;
}

Value Interpreter::EvalCall(const Expr& expr) {
  const Expr& callee = *expr.args[0];
  if (callee.kind == Expr::Kind::kAttribute) {
    const Value self = Eval(*callee.args[0]);
    const Call call = MakeCall(expr, callee.name, self);
    return ok() ? Unwrap(expr.line, CallMethod(call), Value()) : Value();
  }
  const Value value = Eval(callee);
  const auto* function = value.As<Function>();
  if (function == nullptr) {
    Fail(expr.line, fmt::format("\"{}\" is {}, not a function", callee.name, value.KindName()));
    return Value();
  }
  const Call call = MakeCall(expr, function->name, Value());
  if (!ok()) return Value();
  if (function->macro != nullptr) return CallMacro(*function->macro, call, expr.line);
  return Unwrap(expr.line, CallGlobalFunction(call), Value());
}

Value Interpreter::CallMacro(const Macro& macro, const Call& call, int line) {
  if (calls_ >= kMaxCalls) {
    Fail(line, fmt::format("macros call each other over {} deep", kMaxCalls));
    return Value();
  }
  // A macro sees the template's variables and its own, not those of the place it is called from.
  std::vector<Scope> outer(std::make_move_iterator(scopes_.begin() + 1),
                           std::make_move_iterator(scopes_.end()));
  scopes_.resize(1);
  scopes_.emplace_back();
  ++calls_;
  for (size_t i = 0; i < macro.parameters.size(); ++i) {
    const auto& [name, fallback] = macro.parameters[i];
    const Value given = call.Argument(i, name);
    scopes_.back()[name] = given.IsUndefined() ? EvalOr(fallback) : given;
  }
  Text text = Capture(macro.body);
  --calls_;
  scopes_.resize(1);
  std::move(outer.begin(), outer.end(), std::back_inserter(scopes_));
  return Value(std::move(text));
}

}  // namespace tandem::jinja
