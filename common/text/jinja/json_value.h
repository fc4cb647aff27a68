// JSON to and from the values of a template. Pure functions, thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

#include "common/text/jinja/value.h"

namespace tandem::jinja {

// All texts, keys too, are marked as data. Numbers keep Python's spelling. Errors as ToPythonJson.
absl::StatusOr<Value> FromJson(std::string_view text, std::string_view what);

struct JsonStyle {
  int indent = -1;  // < 0: all on one line
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::string item_separator = ", ";  // Python's defaults; with an indent "," is
  std::string key_separator = ": ";
};
// As Python's json.dumps, marked as data all of it: only data is ever printed so. InvalidArgument
// for a value that JSON cannot show.
absl::StatusOr<Text> ToJson(const Value& value, const JsonStyle& style);

}  // namespace tandem::jinja
