// Runs the statements of a template. For template.cc only.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/text/jinja/ast.h"
#include "common/text/jinja/builtins.h"

namespace tandem::jinja {

// Used once, by one thread. The first error sticks and ends every loop; what is computed after it
// is thrown away.
class Interpreter {
 public:
  Interpreter(const Dict& variables, absl::Time now);

  absl::StatusOr<Text> Run(const Body& body);

 private:
  enum class Flow { kNext, kBreak, kContinue };
  using Scope = std::map<std::string, Value, std::less<>>;

  Flow RunBody(const Body& body);
  Flow RunStatement(const Stmt& statement);
  Flow RunFor(const Stmt& statement);
  void RunSet(const Stmt& statement);
  Text Capture(const Body& body);
  Value LoopValue(const List& elements, size_t index) const;
  // Binds targets to `value`, unpacking it if there are several.
  void Bind(const std::vector<std::string>& targets, const Value& value, int line);

  Value Eval(const Expr& expr);
  Value EvalOr(const ExprPtr& expr);  // undefined for null
  Value EvalBinary(const Expr& expr);
  Value Add(const Expr& expr, const Value& a, const Value& b);
  Value Arithmetic(const Expr& expr, const Value& a, const Value& b);
  Value EvalMember(const Expr& expr);
  Value EvalCall(const Expr& expr);
  Value CallMacro(const Macro& macro, const Call& call, int line);
  // Arguments of a call, filter or test, which args[0] is applied to.
  Call MakeCall(const Expr& expr, std::string_view name, Value self);
  Value Lookup(const std::string& name) const;

  template <class T>
  T Unwrap(int line, absl::StatusOr<T> result, T fallback);
  void Fail(int line, std::string_view what);
  bool ok() const { return status_.ok(); }
  void CountStep(int line);

  const absl::Time now_;
  std::vector<Scope> scopes_;  // the innermost last
  Text* out_ = nullptr;
  int64_t steps_ = 0;
  int calls_ = 0;  // macros that run now
  absl::Status status_;
};

}  // namespace tandem::jinja
