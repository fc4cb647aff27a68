// absl::Status <-> grpc::Status, with google.rpc error details.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "grpcpp/support/status.h"

namespace tandem {

// Attaches a google.rpc.BadRequest field violation to an InvalidArgument status: `field` is the
// proto path, e.g. "sampling.temperature" or "messages[2].role". Kept as a payload of the status
// until ToGrpcStatus.
absl::Status WithField(absl::Status status, const std::string& field);
// INVALID_ARGUMENT "<field> <rest>" with that field violation:
// BadField("top_k", "must be >= 1, got {}", k).
template <typename... Args>
absl::Status BadField(const std::string& field, fmt::format_string<Args...> rest, Args&&... args) {
  return WithField(absl::InvalidArgumentError(
                       fmt::format("{} {}", field, fmt::format(rest, std::forward<Args>(args)...))),
                   field);
}
// Attaches a google.rpc.RetryInfo.
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);

// What WithField and WithRetryAfter attached, also on the client's side of the wire.
struct FieldViolation {
  std::string field;
  std::string description;
};
std::vector<FieldViolation> FieldViolations(const absl::Status& status);
std::optional<absl::Duration> RetryAfter(const absl::Status& status);

// Code and message (made valid UTF-8, cut at 1,000 bytes), with a google.rpc.Status holding the
// details (grpc-status-details-bin). FromGrpcStatus keeps them.
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace tandem
