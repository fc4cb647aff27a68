// Where KV blocks go: values <-> messages. Functions without state: thread-safe. No gRPC.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

#include "kvtransfer/channel/kv_endpoints.h"
#include "tandem/internal/v1/prefill.pb.h"

namespace tandem::worker {

// All of a target but for its first block; not whether it has an address, which not every one
// needs. Errors are INVALID_ARGUMENT and name the field of `name`.
absl::StatusOr<kvtransfer::KvSendTarget> KvTargetFromProto(const internal::v1::KvTarget& target,
                                                           std::string_view name);

}  // namespace tandem::worker
