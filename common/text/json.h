// JSON for files and fields that strangers wrote: bounded depth, errors as a status that says
// where, and Python's way of printing.
//
// Pure functions, thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace tandem {

// Deeper nesting is refused: no file or field read here needs it.
inline constexpr int kMaxJsonDepth = 64;

// InvalidArgument "<what>: not valid JSON at byte N: ..." if `text` is not one JSON value in UTF-8.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what);

// Reads `text` and writes it as Python's json.dumps(json.loads(text), ensure_ascii=False) does:
// separators ", " and ": ", keys in the order given, of equal keys the last value at the place of
// the first, floats in Python's shortest form, integers of any size. Errors as ParseJson; also NaN,
// Infinity, numbers beyond a double and lone surrogates are refused. This is the `tojson` of
// Hugging Face chat templates.
absl::StatusOr<std::string> ToPythonJson(std::string_view text, std::string_view what);

// A float as Python's repr prints it: shortest digits, exponent below 1e-4 and from 1e16 on.
std::string PythonFloat(double value);
// Appends a string as json.dumps(..., ensure_ascii=False) prints it. `text` must be valid UTF-8.
void AppendJsonString(std::string_view text, std::string* out);

}  // namespace tandem
