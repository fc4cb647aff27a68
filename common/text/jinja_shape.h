// What a Jinja template is, whatever its spacing and quoting: enough to recognise known chat
// templates, not to run any.
//
// Pure functions, thread-safe.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tandem {

// One token of a template: a tag's border ("{%", "%}", "{{", "}}"), a word or punctuation mark
// inside a tag, a string literal with its escapes resolved, or the text between tags that would be
// printed.
struct JinjaToken {
  enum class Kind { kMark, kString, kText };
  Kind kind;
  std::string value;

  bool operator==(const JinjaToken&) const = default;
};

// The tokens of `source`, read with trim_blocks and lstrip_blocks as Hugging Face does. Comments
// are dropped, and x['name'] is read as x.name. nullopt if a tag or string is not closed or uses an
// escape other than \n \r \t \\ \' \".
std::optional<std::vector<JinjaToken>> ReadJinja(std::string_view source);

// Whether `tokens` equals `pattern`, where `hole` inside a string literal of the pattern stands for
// any text. `captures` gets what the holes stand for, in order. At most one hole per literal.
bool MatchJinja(const std::vector<JinjaToken>& pattern, std::string_view hole,
                const std::vector<JinjaToken>& tokens, std::vector<std::string>* captures);

}  // namespace tandem
