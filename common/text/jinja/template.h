// Runs a Jinja template as Hugging Face's apply_chat_template does (sandbox, trim_blocks,
// lstrip_blocks, raise_exception, strftime_now, loop controls, tojson without HTML escapes).
//
// A Template is immutable after Parse and thread-safe. Rendering is bounded in steps, depth and
// output, whatever the template says.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/text/jinja/ast.h"

namespace tandem::jinja {

class Template {
 public:
  // InvalidArgument "line N: ..." for what is malformed or not supported (see parser.h).
  static absl::StatusOr<Template> Parse(std::string_view source);

  // Whether the template reads a variable or attribute of this name anywhere.
  bool Mentions(std::string_view name) const { return names_.contains(name); }

  // `variables` are what the template sees by name; `now` is the time that strftime_now shows.
  // InvalidArgument "line N: ..." for raise_exception and for an operation that Python refuses;
  // ResourceExhausted when a bound is reached.
  absl::StatusOr<Text> Render(const Dict& variables, absl::Time now) const;

 private:
  std::shared_ptr<const Body> body_;
  std::set<std::string, std::less<>> names_;
};

}  // namespace tandem::jinja
