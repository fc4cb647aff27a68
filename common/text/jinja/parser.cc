#include "common/text/jinja/parser.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "common/base/status.h"
#include "common/text/jinja/expression_parser.h"
#include "common/text/jinja/lexer.h"

namespace tandem::jinja {
namespace {

using StmtKind = Stmt::Kind;

constexpr int kMaxBlockNesting = 50;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)), expressions_(&tokens_) {}

  absl::StatusOr<Body> Run() {
    Body body = ParseBody({});
    if (!tokens_.status().ok()) return tokens_.status();
    return body;
  }

 private:
  std::unique_ptr<Stmt> New(StmtKind kind) const {
    auto statement = std::make_unique<Stmt>();
    statement->kind = kind;
    statement->line = tokens_.Peek().line;
    return statement;
  }

  // Statements up to a tag that begins with one of `ends`, of which the name is taken and kept in
  // end_. Without `ends`: to the end of the template.
  Body ParseBody(std::initializer_list<std::string_view> ends) {
    Body body;
    if (++depth_ > kMaxBlockNesting) tokens_.Fail("blocks are nested too deeply");
    while (tokens_.status().ok()) {
      const Token::Kind kind = tokens_.Peek().kind;
      if (kind == Token::Kind::kEnd) {
        if (ends.size() > 0) tokens_.Fail(fmt::format("\"{}\" is missing", *(ends.end() - 1)));
        break;
      }
      if (kind == Token::Kind::kText) {
        auto text = New(StmtKind::kText);
        text->text = Text(tokens_.Take().value);
        body.push_back(std::move(text));
      } else if (kind == Token::Kind::kVariableBegin) {
        tokens_.Take();
        auto output = New(StmtKind::kOutput);
        output->expr = expressions_.ParseTuple();
        tokens_.Expect(Token::Kind::kVariableEnd, "\"}}\"");
        body.push_back(std::move(output));
      } else {
        tokens_.Expect(Token::Kind::kBlockBegin, "a tag");
        end_ = tokens_.ExpectName();
        if (std::find(ends.begin(), ends.end(), end_) != ends.end()) break;
        body.push_back(ParseStatement(end_));
      }
    }
    --depth_;
    return body;
  }

  void EndTag() { tokens_.Expect(Token::Kind::kBlockEnd, "\"%}\""); }

  std::unique_ptr<Stmt> ParseStatement(const std::string& name) {
    if (name == "if") return ParseIf();
    if (name == "for") return ParseFor();
    if (name == "set") return ParseSet();
    if (name == "macro") return ParseMacro();
    if (name == "generation") return ParseGroup("endgeneration");
    if (name == "break" || name == "continue") {
      auto statement = New(name == "break" ? StmtKind::kBreak : StmtKind::kContinue);
      EndTag();
      return statement;
    }
    tokens_.Fail(fmt::format("the tag \"{}\" is not supported", name));
    return New(StmtKind::kGroup);
  }

  std::unique_ptr<Stmt> ParseIf() {
    auto statement = New(StmtKind::kIf);
    statement->expr = expressions_.ParseTuple();
    EndTag();
    statement->body = ParseBody({"elif", "else", "endif"});
    // After a failure end_ may still be an earlier tag's.
    if (!tokens_.status().ok()) return statement;
    if (end_ == "elif") {
      if (++depth_ > kMaxBlockNesting) tokens_.Fail("blocks are nested too deeply");
      statement->otherwise.push_back(ParseIf());
      --depth_;
      return statement;
    }
    if (end_ == "else") {
      EndTag();
      statement->otherwise = ParseBody({"endif"});
    }
    EndTag();
    return statement;
  }

  std::vector<std::string> ParseTargets() {
    std::vector<std::string> targets;
    const bool bracket = tokens_.SkipOperator("(");
    targets.push_back(tokens_.ExpectName());
    while (tokens_.SkipOperator(",")) targets.push_back(tokens_.ExpectName());
    if (bracket) tokens_.ExpectOperator(")");
    return targets;
  }

  std::unique_ptr<Stmt> ParseFor() {
    auto statement = New(StmtKind::kFor);
    statement->targets = ParseTargets();
    if (!tokens_.SkipName("in")) tokens_.Fail("expected \"in\"");
    statement->expr = expressions_.ParseWithoutIf();
    if (tokens_.SkipName("if")) statement->condition = expressions_.Parse();
    if (tokens_.IsName("recursive")) tokens_.Fail("recursive loops are not supported");
    EndTag();
    statement->body = ParseBody({"else", "endfor"});
    if (end_ == "else") {
      EndTag();
      statement->otherwise = ParseBody({"endfor"});
    }
    EndTag();
    return statement;
  }

  std::unique_ptr<Stmt> ParseSet() {
    auto statement = New(StmtKind::kSet);
    statement->targets = ParseTargets();
    if (tokens_.SkipOperator(".")) statement->attribute = tokens_.ExpectName();
    if (tokens_.SkipOperator("=")) {
      statement->expr = expressions_.ParseTuple();
      EndTag();
      return statement;
    }
    statement->kind = StmtKind::kSetBlock;
    EndTag();
    statement->body = ParseBody({"endset"});
    EndTag();
    return statement;
  }

  std::unique_ptr<Stmt> ParseMacro() {
    auto statement = New(StmtKind::kMacro);
    statement->macro.name = tokens_.ExpectName();
    statement->macro.parameters = expressions_.ParseParameters();
    EndTag();
    statement->macro.body = ParseBody({"endmacro"});
    tokens_.SkipName(statement->macro.name);
    EndTag();
    return statement;
  }

  std::unique_ptr<Stmt> ParseGroup(std::string_view end) {
    auto statement = New(StmtKind::kGroup);
    EndTag();
    statement->body = ParseBody({end});
    EndTag();
    return statement;
  }

  TokenStream tokens_;
  ExpressionParser expressions_;
  std::string end_;
  int depth_ = 0;
};

}  // namespace

absl::StatusOr<Body> Parse(std::string_view source) {
  TANDEM_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace tandem::jinja
