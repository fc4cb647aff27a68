// The file of --api-keys-file: who may use the public API, and how much of it.
//
//   - name: team-a                 # in logs and metrics
//     sha256: 9f86d0...            # of the key, in hex; a list while a key is being replaced
//     tenant: acme                 # shares cached prefixes with no other tenant
//     requests_per_minute: 600
//     tokens_per_minute: 1000000   # of prompts and answers together
//     max_priority: 0              # highest options.priority
//
// All but `name` and `sha256` may be left out, which means no tenant and no limit. It is YAML, and
// JSON is YAML too. The file holds digests only (see common/auth/api_key.h), so who reads it cannot
// use the API.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::router {

struct ApiKeyEntry {
  std::string name;
  std::vector<std::string> digests;  // ApiKeyDigest of each key; at least one
  std::string tenant;                // "": none
  double requests_per_minute = 0;    // 0: no limit
  double tokens_per_minute = 0;      // 0: no limit
  std::optional<int> max_priority;   // within the router's own bound
};

// Pure. INVALID_ARGUMENT names the line and what is wrong: no list, an unknown or missing field, a
// value out of range, a name or digest that stands there twice, no key at all.
absl::StatusOr<std::vector<ApiKeyEntry>> ParseApiKeys(const std::string& text);

}  // namespace tandem::router
