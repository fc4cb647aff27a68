// Builders for absl::Status with fmt format strings. Messages name the field, the limit and the
// fix.
#pragma once

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "fmt/format.h"

namespace tandem {

#define TANDEM_DEFINE_STATUS_BUILDER(Name)                                      \
  template <typename... Args>                                                   \
  absl::Status Name(fmt::format_string<Args...> format, Args&&... args) {       \
    return absl::Name##Error(fmt::format(format, std::forward<Args>(args)...)); \
  }

TANDEM_DEFINE_STATUS_BUILDER(InvalidArgument)
TANDEM_DEFINE_STATUS_BUILDER(NotFound)
TANDEM_DEFINE_STATUS_BUILDER(FailedPrecondition)
TANDEM_DEFINE_STATUS_BUILDER(ResourceExhausted)
TANDEM_DEFINE_STATUS_BUILDER(Unavailable)
TANDEM_DEFINE_STATUS_BUILDER(PermissionDenied)
TANDEM_DEFINE_STATUS_BUILDER(DeadlineExceeded)
TANDEM_DEFINE_STATUS_BUILDER(Cancelled)
TANDEM_DEFINE_STATUS_BUILDER(Aborted)
TANDEM_DEFINE_STATUS_BUILDER(DataLoss)
TANDEM_DEFINE_STATUS_BUILDER(Internal)
TANDEM_DEFINE_STATUS_BUILDER(AlreadyExists)

#undef TANDEM_DEFINE_STATUS_BUILDER

// The status's message as std::string: fmt cannot print the string_view of the installed abseil.
inline std::string MessageOf(const absl::Status& status) {
  return std::string(status.message().data(), status.message().size());
}

}  // namespace tandem

#define TANDEM_CONCAT_INNER(a, b) a##b
#define TANDEM_CONCAT(a, b) TANDEM_CONCAT_INNER(a, b)

// Returns from the enclosing function if `expr` (an absl::Status) is not OK.
#define TANDEM_RETURN_IF_ERROR(expr)                                  \
  do {                                                                \
    if (absl::Status status_ = (expr); !status_.ok()) return status_; \
  } while (false)

// TANDEM_ASSIGN_OR_RETURN(auto x, F()): assigns the value of an absl::StatusOr or returns its
// status.
#define TANDEM_ASSIGN_OR_RETURN(lhs, expr) \
  TANDEM_ASSIGN_OR_RETURN_IMPL(TANDEM_CONCAT(statusor_, __LINE__), lhs, expr)
#define TANDEM_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                 \
  if (!tmp.ok()) return tmp.status();                \
  lhs = std::move(tmp).value()
