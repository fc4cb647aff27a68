#include "common/text/jinja/template.h"

#include <utility>

#include "common/base/status.h"
#include "common/text/jinja/interpreter.h"
#include "common/text/jinja/parser.h"

namespace tandem::jinja {
namespace {

using Names = std::set<std::string, std::less<>>;

// Names of variables and attributes, and all strings, which may be keys (message['content']).
void Collect(const Expr& expr, Names* names) {
  if (expr.kind == Expr::Kind::kName || expr.kind == Expr::Kind::kAttribute) {
    names->insert(expr.name);
  }
  if (const Text* text = expr.constant.text()) names->emplace(text->chars());
  for (const ExprPtr& arg : expr.args) {
    if (arg != nullptr) Collect(*arg, names);
  }
  for (const auto& [key, value] : expr.kwargs) Collect(*value, names);
}

void Collect(const Body& body, Names* names) {
  for (const auto& statement : body) {
    for (const ExprPtr* expr : {&statement->expr, &statement->condition}) {
      if (*expr != nullptr) Collect(**expr, names);
    }
    for (const Body* inner : {&statement->body, &statement->otherwise, &statement->macro.body}) {
      Collect(*inner, names);
    }
  }
}

}  // namespace

absl::StatusOr<Template> Template::Parse(std::string_view source) {
  TANDEM_ASSIGN_OR_RETURN(Body body, jinja::Parse(source));
  Template result;
  Collect(body, &result.names_);
  result.body_ = std::make_shared<const Body>(std::move(body));
  return result;
}

absl::StatusOr<Text> Template::Render(const Dict& variables, absl::Time now) const {
  return Interpreter(variables, now).Run(*body_);
}

}  // namespace tandem::jinja
