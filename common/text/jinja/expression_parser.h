// Parses Jinja's expressions by recursive descent. For parser.cc only.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

#include "common/text/jinja/ast.h"
#include "common/text/jinja/lexer.h"

namespace tandem::jinja {

// A place in a list of tokens. The first error sticks; after it every token is the last one, so
// that parsing ends by itself.
class TokenStream {
 public:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& Peek(size_t ahead = 0) const;
  Token Take();
  bool IsOperator(std::string_view value) const;
  bool IsName(std::string_view value) const;
  // Takes the token if it is this one.
  bool SkipOperator(std::string_view value);
  bool SkipName(std::string_view value);
  // Takes the token, or fails.
  void ExpectOperator(std::string_view value);
  std::string ExpectName();
  void Expect(Token::Kind kind, std::string_view what);

  void Fail(std::string_view what);
  const absl::Status& status() const { return status_; }

 private:
  std::vector<Token> tokens_;
  size_t pos_ = 0;
  absl::Status status_;
};

class ExpressionParser {
 public:
  explicit ExpressionParser(TokenStream* tokens) : tokens_(*tokens) {}

  // A whole expression; never null, whatever the stream's status.
  ExprPtr Parse() { return Conditional(); }
  // As Parse, or several with commas between them as one list.
  ExprPtr ParseTuple();
  // As Parse, but an `if` behind it is left alone, as in `for x in y if z`.
  ExprPtr ParseWithoutIf() { return Or(); }
  // (name, name=default, ...) of a macro.
  std::vector<std::pair<std::string, ExprPtr>> ParseParameters();

 private:
  struct Nesting;
  // Counts one more link of a chain; false once parsing has failed.
  bool Extend(int* chain);
  std::unique_ptr<Expr> New(Expr::Kind kind, std::string name = "") const;
  std::unique_ptr<Expr> Binary(std::string name, ExprPtr left, ExprPtr right) const;
  using Level = ExprPtr (ExpressionParser::*)();
  ExprPtr LeftAssociative(std::initializer_list<std::string_view> operators, Level operand);

  ExprPtr Conditional();
  ExprPtr Or();
  ExprPtr And();
  ExprPtr Not();
  ExprPtr Compare();
  ExprPtr Sum();
  ExprPtr Concatenation();
  ExprPtr Product();
  ExprPtr Power();
  ExprPtr Unary();
  ExprPtr Primary();
  ExprPtr Bracketed(std::string_view close);
  ExprPtr DictLiteral();
  ExprPtr Postfix(ExprPtr value);
  ExprPtr FilterOrTest(ExprPtr value);
  ExprPtr Subscript(ExprPtr value);
  ExprPtr Test(ExprPtr value);
  void Arguments(Expr* call);

  TokenStream& tokens_;
  int depth_ = 0;
};

}  // namespace tandem::jinja
