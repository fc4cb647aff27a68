#include "common/text/jinja/expression_parser.h"

#include <algorithm>
#include <charconv>

#include "common/base/status.h"
#include "common/text/jinja/builtins.h"

namespace tandem::jinja {
namespace {

using ExprKind = Expr::Kind;

constexpr int kMaxExpressionNesting = 100;
// Operators, attributes or filters in a row: each is one level deeper in the tree.
constexpr int kMaxChain = 1000;

}  // namespace

const Token& TokenStream::Peek(size_t ahead) const {
  return tokens_[status_.ok() ? std::min(pos_ + ahead, tokens_.size() - 1) : tokens_.size() - 1];
}

Token TokenStream::Take() {
  Token token = Peek();
  if (pos_ + 1 < tokens_.size()) ++pos_;
  return token;
}

bool TokenStream::IsOperator(std::string_view value) const {
  return Peek().kind == Token::Kind::kOperator && Peek().value == value;
}
bool TokenStream::IsName(std::string_view value) const {
  return Peek().kind == Token::Kind::kName && Peek().value == value;
}
bool TokenStream::SkipOperator(std::string_view value) {
  const bool is = IsOperator(value);
  if (is) Take();
  return is;
}
bool TokenStream::SkipName(std::string_view value) {
  const bool is = IsName(value);
  if (is) Take();
  return is;
}

void TokenStream::ExpectOperator(std::string_view value) {
  if (!SkipOperator(value)) {
    Fail(fmt::format("expected \"{}\" before \"{}\"", value, Peek().value));
  }
}

std::string TokenStream::ExpectName() {
  if (Peek().kind != Token::Kind::kName) {
    Fail(fmt::format("expected a name before \"{}\"", Peek().value));
    return "";
  }
  return Take().value;
}

void TokenStream::Expect(Token::Kind kind, std::string_view what) {
  if (Peek().kind == kind) {
    Take();
  } else {
    Fail(fmt::format("expected {} before \"{}\"", what, Peek().value));
  }
}

void TokenStream::Fail(std::string_view what) {
  if (status_.ok()) status_ = InvalidArgument("line {}: {}", Peek().line, what);
}

// Bounds the recursion of the parser, and so of whatever walks the tree.
struct ExpressionParser::Nesting {
  explicit Nesting(ExpressionParser* parser) : parser(parser) {
    if (++parser->depth_ > kMaxExpressionNesting)
      parser->tokens_.Fail("an expression is nested too deeply");
  }
  ~Nesting() { --parser->depth_; }
  ExpressionParser* const parser;
};

bool ExpressionParser::Extend(int* chain) {
  if (++*chain > kMaxChain) tokens_.Fail("an expression is too long");
  return tokens_.status().ok();
}

std::unique_ptr<Expr> ExpressionParser::New(ExprKind kind, std::string name) const {
  auto expr = std::make_unique<Expr>();
  expr->kind = kind;
  expr->line = tokens_.Peek().line;
  expr->name = std::move(name);
  return expr;
}

std::unique_ptr<Expr> ExpressionParser::Binary(std::string name, ExprPtr left,
                                               ExprPtr right) const {
  auto expr = New(ExprKind::kBinary, std::move(name));
  expr->args.push_back(std::move(left));
  expr->args.push_back(std::move(right));
  return expr;
}

ExprPtr ExpressionParser::LeftAssociative(std::initializer_list<std::string_view> operators,
                                          Level operand) {
  ExprPtr left = (this->*operand)();
  int chain = 0;
  while (Extend(&chain) &&
         std::any_of(operators.begin(), operators.end(),
                     [this](std::string_view name) { return tokens_.IsOperator(name); })) {
    std::string name = tokens_.Take().value;
    ExprPtr right = (this->*operand)();
    left = Binary(std::move(name), std::move(left), std::move(right));
  }
  return left;
}

ExprPtr ExpressionParser::ParseTuple() {
  ExprPtr first = Parse();
  if (!tokens_.IsOperator(",")) return first;
  auto list = New(ExprKind::kList);
  list->args.push_back(std::move(first));
  while (tokens_.SkipOperator(",")) list->args.push_back(Parse());
  return list;
}

std::vector<std::pair<std::string, ExprPtr>> ExpressionParser::ParseParameters() {
  std::vector<std::pair<std::string, ExprPtr>> parameters;
  tokens_.ExpectOperator("(");
  while (tokens_.status().ok() && !tokens_.SkipOperator(")")) {
    std::string name = tokens_.ExpectName();
    ExprPtr fallback = tokens_.SkipOperator("=") ? Parse() : nullptr;
    parameters.emplace_back(std::move(name), std::move(fallback));
    if (!tokens_.IsOperator(")")) tokens_.ExpectOperator(",");
  }
  return parameters;
}

ExprPtr ExpressionParser::Conditional() {
  const Nesting nesting(this);
  ExprPtr value = Or();
  int chain = 0;
  while (Extend(&chain) && tokens_.SkipName("if")) {
    auto expr = New(ExprKind::kConditional);
    expr->args.push_back(std::move(value));
    expr->args.push_back(Or());
    expr->args.push_back(tokens_.SkipName("else") ? Parse() : nullptr);
    value = std::move(expr);
  }
  return value;
}

ExprPtr ExpressionParser::Or() {
  ExprPtr left = And();
  int chain = 0;
  while (Extend(&chain) && tokens_.SkipName("or")) left = Binary("or", std::move(left), And());
  return left;
}

ExprPtr ExpressionParser::And() {
  ExprPtr left = Not();
  int chain = 0;
  while (Extend(&chain) && tokens_.SkipName("and")) left = Binary("and", std::move(left), Not());
  return left;
}

ExprPtr ExpressionParser::Not() {
  const Nesting nesting(this);
  if (!tokens_.SkipName("not")) return Compare();
  auto expr = New(ExprKind::kNot);
  expr->args.push_back(Not());
  return expr;
}

ExprPtr ExpressionParser::Compare() {
  ExprPtr left = Sum();
  int comparisons = 0;
  while (tokens_.status().ok()) {
    std::string name;
    for (const char* symbol : {"==", "!=", "<", "<=", ">", ">="}) {
      if (name.empty() && tokens_.SkipOperator(symbol)) name = symbol;
    }
    if (name.empty() && tokens_.SkipName("in")) name = "in";
    const Token& next = tokens_.Peek(1);
    if (name.empty() && tokens_.IsName("not") && next.kind == Token::Kind::kName &&
        next.value == "in") {
      tokens_.Take();
      tokens_.Take();
      name = "not in";
    }
    if (name.empty()) break;
    if (++comparisons > 1) tokens_.Fail("chained comparisons are not supported");
    left = Binary(std::move(name), std::move(left), Sum());
  }
  return left;
}

ExprPtr ExpressionParser::Sum() {
  return LeftAssociative({"+", "-"}, &ExpressionParser::Concatenation);
}
ExprPtr ExpressionParser::Concatenation() {
  return LeftAssociative({"~"}, &ExpressionParser::Product);
}
ExprPtr ExpressionParser::Product() {
  return LeftAssociative({"*", "/", "//", "%"}, &ExpressionParser::Power);
}
ExprPtr ExpressionParser::Power() { return LeftAssociative({"**"}, &ExpressionParser::Unary); }

// The sign binds tighter than a filter: -1 | abs is (-1) | abs.
ExprPtr ExpressionParser::Unary() {
  const Nesting nesting(this);
  if (tokens_.SkipOperator("-")) {
    auto expr = New(ExprKind::kNegative);
    expr->args.push_back(Postfix(Primary()));
    return FilterOrTest(std::move(expr));
  }
  tokens_.SkipOperator("+");
  return FilterOrTest(Postfix(Primary()));
}

ExprPtr ExpressionParser::Primary() {
  const Token token = tokens_.Take();
  auto constant = [&](Value value) {
    auto expr = New(ExprKind::kConstant);
    expr->constant = std::move(value);
    return expr;
  };
  switch (token.kind) {
    case Token::Kind::kName:
      if (token.value == "true" || token.value == "True") return constant(Value(true));
      if (token.value == "false" || token.value == "False") return constant(Value(false));
      if (token.value == "none" || token.value == "None") return constant(Value(None{}));
      return New(ExprKind::kName, token.value);
    case Token::Kind::kInteger: {
      int64_t value = 0;
      std::from_chars(token.value.data(), token.value.data() + token.value.size(), value);
      return constant(Value(value));
    }
    case Token::Kind::kFloat:
      return constant(Value(Float{std::strtod(token.value.c_str(), nullptr), ""}));
    case Token::Kind::kString: {
      std::string value = token.value;
      while (tokens_.Peek().kind == Token::Kind::kString) value += tokens_.Take().value;
      return constant(Value(Text(value)));
    }
    default:
      if (token.value == "(") return Bracketed(")");
      if (token.value == "[") return Bracketed("]");
      if (token.value == "{") return DictLiteral();
      tokens_.Fail(fmt::format("unexpected \"{}\"", token.value));
      return constant(Value());
  }
}

// Behind "(" or "[", up to `close`: a tuple or list; (x) is x.
ExprPtr ExpressionParser::Bracketed(std::string_view close) {
  auto list = New(ExprKind::kList);
  bool has_comma = false;
  while (tokens_.status().ok() && !tokens_.IsOperator(close)) {
    list->args.push_back(Parse());
    if (!tokens_.SkipOperator(",")) break;
    has_comma = true;
  }
  tokens_.ExpectOperator(close);
  if (close == ")" && !has_comma && list->args.size() == 1) return std::move(list->args[0]);
  return list;
}

ExprPtr ExpressionParser::DictLiteral() {
  auto dict = New(ExprKind::kDict);
  while (tokens_.status().ok() && !tokens_.SkipOperator("}")) {
    dict->args.push_back(Parse());
    tokens_.ExpectOperator(":");
    dict->args.push_back(Parse());
    if (!tokens_.IsOperator("}")) tokens_.ExpectOperator(",");
  }
  return dict;
}

ExprPtr ExpressionParser::Postfix(ExprPtr value) {
  int chain = 0;
  while (Extend(&chain)) {
    if (tokens_.SkipOperator(".")) {
      auto expr = New(ExprKind::kAttribute);
      // a.0 is a[0].
      expr->name = tokens_.Peek().kind == Token::Kind::kInteger ? tokens_.Take().value
                                                                : tokens_.ExpectName();
      expr->args.push_back(std::move(value));
      value = std::move(expr);
    } else if (tokens_.SkipOperator("[")) {
      value = Subscript(std::move(value));
    } else if (tokens_.IsOperator("(")) {
      auto expr = New(ExprKind::kCall);
      expr->args.push_back(std::move(value));
      Arguments(expr.get());
      value = std::move(expr);
    } else {
      break;
    }
  }
  return value;
}

ExprPtr ExpressionParser::Subscript(ExprPtr value) {
  auto expr = New(ExprKind::kItem);
  expr->args.push_back(std::move(value));
  for (int part = 0; part < 3 && tokens_.status().ok(); ++part) {
    const bool left_out = tokens_.IsOperator(":") || tokens_.IsOperator("]");
    expr->args.push_back(left_out ? nullptr : Parse());
    if (!tokens_.SkipOperator(":")) break;
    expr->kind = ExprKind::kSlice;
  }
  if (expr->kind == ExprKind::kSlice) {
    while (expr->args.size() < 4) expr->args.push_back(nullptr);
  } else if (expr->args[1] == nullptr) {
    tokens_.Fail("an index is missing");
  }
  tokens_.ExpectOperator("]");
  return expr;
}

ExprPtr ExpressionParser::FilterOrTest(ExprPtr value) {
  int chain = 0;
  while (Extend(&chain)) {
    if (tokens_.SkipOperator("|")) {
      auto expr = New(ExprKind::kFilter, tokens_.ExpectName());
      if (!IsFilter(expr->name)) {
        tokens_.Fail(fmt::format("the filter \"{}\" is not supported", expr->name));
      }
      expr->args.push_back(std::move(value));
      if (tokens_.IsOperator("(")) Arguments(expr.get());
      value = std::move(expr);
    } else if (tokens_.SkipName("is")) {
      value = Test(std::move(value));
    } else {
      break;
    }
  }
  return value;
}

ExprPtr ExpressionParser::Test(ExprPtr value) {
  const bool negated = tokens_.SkipName("not");
  // `is none`, `is true`: names that are constants elsewhere; `is in [..]`.
  auto expr = New(ExprKind::kTest, tokens_.ExpectName());
  if (!IsTest(expr->name)) {
    tokens_.Fail(fmt::format("the test \"{}\" is not supported", expr->name));
  }
  expr->args.push_back(std::move(value));
  const Token& next = tokens_.Peek();
  const bool starts_value = next.kind == Token::Kind::kString ||
                            next.kind == Token::Kind::kInteger || tokens_.IsOperator("[") ||
                            tokens_.IsOperator("{") ||
                            (next.kind == Token::Kind::kName && next.value != "else" &&
                             next.value != "or" && next.value != "and" && next.value != "is" &&
                             next.value != "if" && next.value != "not" && next.value != "in");
  if (tokens_.IsOperator("(")) {
    Arguments(expr.get());
  } else if (starts_value) {
    expr->args.push_back(Postfix(Primary()));
  }
  if (!negated) return expr;
  auto inverse = New(ExprKind::kNot);
  inverse->args.push_back(std::move(expr));
  return inverse;
}

void ExpressionParser::Arguments(Expr* call) {
  tokens_.ExpectOperator("(");
  while (tokens_.status().ok() && !tokens_.SkipOperator(")")) {
    const Token& next = tokens_.Peek(1);
    const bool named = tokens_.Peek().kind == Token::Kind::kName &&
                       next.kind == Token::Kind::kOperator && next.value == "=";
    if (named) {
      std::string name = tokens_.Take().value;
      tokens_.Take();
      call->kwargs.emplace_back(std::move(name), Parse());
    } else {
      call->args.push_back(Parse());
    }
    if (!tokens_.IsOperator(")")) tokens_.ExpectOperator(",");
  }
}

}  // namespace tandem::jinja
