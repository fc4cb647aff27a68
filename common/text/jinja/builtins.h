// The filters, tests, methods and global functions of Jinja and Python that chat templates use.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/text/jinja/value.h"

namespace tandem::jinja {

// What a filter, test, method or function is called with; `self` is what it is applied to.
struct Call {
  std::string_view name;
  Value self;
  std::vector<Value> args;
  std::vector<std::pair<std::string, Value>> kwargs;
  absl::Time now;  // for strftime_now

  // The argument at `index` or of this name; undefined if there is none.
  Value Argument(size_t index, std::string_view keyword) const;
};

bool IsFilter(std::string_view name);
bool IsTest(std::string_view name);
bool IsGlobalFunction(std::string_view name);

// Errors are InvalidArgument that name what was called. Results that hold data are marked so.
absl::StatusOr<Value> CallFilter(const Call& call);
absl::StatusOr<bool> CallTest(const Call& call);
absl::StatusOr<Value> CallMethod(const Call& call);
absl::StatusOr<Value> CallGlobalFunction(const Call& call);

// The elements that a loop over `value` visits: a list's, a dictionary's keys, a text's characters,
// and none of what is undefined.
absl::StatusOr<List> Elements(const Value& value);
// Whether `element` is in `container`.
absl::StatusOr<bool> Contains(const Value& container, const Value& element);
// value[index] or value.name: undefined where there is no such element. Texts are indexed by
// characters.
Value Item(const Value& value, const Value& index);
// value[begin:end:step] with Python's rules for what is left out (not an integer) or negative.
absl::StatusOr<Value> Slice(const Value& value, const Value& begin, const Value& end,
                            const Value& step);

}  // namespace tandem::jinja
