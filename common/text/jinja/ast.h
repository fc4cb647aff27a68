// A parsed template: statements over expressions. Immutable once parsed, so that threads share it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/text/jinja/value.h"

namespace tandem::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<const Expr>;

struct Expr {
  enum class Kind {
    kConstant,     // constant
    kName,         // name
    kList,         // args; tuples too
    kDict,         // args: key, value, key, value, ...
    kAttribute,    // args[0].name
    kItem,         // args[0][args[1]]
    kSlice,        // args[0][args[1]:args[2]:args[3]], null where left out
    kCall,         // args[0](args[1..], kwargs); of a kAttribute: a method
    kFilter,       // args[0] | name(args[1..], kwargs)
    kTest,         // args[0] is name(args[1..])
    kNot,          // args[0]
    kNegative,     // args[0]
    kBinary,       // args[0] `name` args[1], `name` an operator
    kConditional,  // args[0] if args[1] else args[2], null where left out
  };
  Kind kind;
  int line;
  std::string name;
  Value constant;
  std::vector<ExprPtr> args;
  std::vector<std::pair<std::string, ExprPtr>> kwargs;
};

struct Stmt;
using Body = std::vector<std::unique_ptr<const Stmt>>;

struct Macro {
  std::string name;
  std::vector<std::pair<std::string, ExprPtr>> parameters;  // with their defaults, or null
  Body body;
};

struct Stmt {
  enum class Kind {
    kText,      // text
    kOutput,    // expr
    kIf,        // expr, body, otherwise
    kFor,       // targets in expr, only where `condition`; body, otherwise
    kSet,       // targets = expr, or targets[0].attribute = expr
    kSetBlock,  // targets[0] = what body prints
    kMacro,     // macro
    kGroup,     // body, as it is
    kBreak,
    kContinue,
  };
  Kind kind;
  int line;
  Text text;
  ExprPtr expr;
  ExprPtr condition;
  std::vector<std::string> targets;
  std::string attribute;
  Body body;
  Body otherwise;
  Macro macro;
};

}  // namespace tandem::jinja
