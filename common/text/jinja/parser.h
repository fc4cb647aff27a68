// Parses a Jinja template: the part of the language that chat templates use (if, for, set, macro,
// generation, break, continue; all expressions but chained comparisons).
//
// Pure function, thread-safe.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

#include "common/text/jinja/ast.h"

namespace tandem::jinja {

// InvalidArgument "line N: ..." names what is malformed or not part of the language above; filters
// and tests are checked here too, so that a template that parses can only fail for its input.
absl::StatusOr<Body> Parse(std::string_view source);

}  // namespace tandem::jinja
