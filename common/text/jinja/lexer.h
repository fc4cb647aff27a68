// Cuts a Jinja template into tokens, with trim_blocks and lstrip_blocks as Hugging Face sets them.
//
// Pure function, thread-safe.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::jinja {

struct Token {
  enum class Kind {
    kText,  // between tags, to be printed
    kVariableBegin,
    kVariableEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kInteger,
    kFloat,
    kString,  // `value` has its escapes resolved
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string value;
  int line;
};

// Comments are dropped; the last token is kEnd. InvalidArgument "line N: ..." for a tag or string
// that is not closed.
absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace tandem::jinja
