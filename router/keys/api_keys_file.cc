#include "router/keys/api_keys_file.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "yaml-cpp/yaml.h"

#include "common/auth/api_key.h"
#include "common/base/nearest_name.h"
#include "common/base/status.h"

namespace tandem::router {
namespace {

// Label values of metrics, and what one second's look at the file costs, grow with it.
constexpr size_t kMaxEntries = 10'000;
constexpr double kMaxPerMinute = 1e12;
constexpr int kMaxPriority = 1'000'000;
const std::vector<std::string>& Fields() {
  static const auto* fields = new std::vector<std::string>{
      "name", "sha256", "tenant", "requests_per_minute", "tokens_per_minute", "max_priority"};
  return *fields;
}

template <typename... Args>
absl::Status At(const YAML::Node& node, fmt::format_string<Args...> format, Args&&... args) {
  return InvalidArgument("line {}: {}", node.Mark().line + 1,
                         fmt::format(format, std::forward<Args>(args)...));
}

absl::Status ReadName(const YAML::Node& node, const char* field, std::string* out) {
  if (!node.IsScalar() || !IsKeyName(node.Scalar())) {
    return At(node, "{} must be 1 to 64 letters, digits or . _ -", field);
  }
  *out = node.Scalar();
  return absl::OkStatus();
}

absl::Status ReadRate(const YAML::Node& node, const std::string& field, double* out) {
  if (!YAML::convert<double>::decode(node, *out) || !(*out > 0 && *out <= kMaxPerMinute)) {
    return At(node, "{} must be a number above 0, up to 1e12", field);
  }
  return absl::OkStatus();
}

// What stands there is not shown: somebody may have put the key itself there.
absl::Status ReadDigest(const YAML::Node& node, std::vector<std::string>* out) {
  const std::string hex = node.IsScalar() ? node.Scalar() : "";
  if (hex.size() != 2 * kApiKeyDigestBytes ||
      !std::all_of(hex.begin(), hex.end(), absl::ascii_isxdigit)) {
    return At(node, "sha256 must be {} hex digits, as `tandem key new` prints them",
              2 * kApiKeyDigestBytes);
  }
  out->push_back(absl::HexStringToBytes(hex));
  return absl::OkStatus();
}

absl::Status ReadDigests(const YAML::Node& node, std::vector<std::string>* out) {
  if (!node.IsSequence()) return ReadDigest(node, out);
  for (const YAML::Node& digest : node) TANDEM_RETURN_IF_ERROR(ReadDigest(digest, out));
  return absl::OkStatus();
}

absl::Status ReadField(const std::string& field, const YAML::Node& value, ApiKeyEntry* out) {
  if (field == "name") return ReadName(value, "name", &out->name);
  if (field == "sha256") return ReadDigests(value, &out->digests);
  if (field == "tenant") return ReadName(value, "tenant", &out->tenant);
  if (field == "requests_per_minute") return ReadRate(value, field, &out->requests_per_minute);
  if (field == "tokens_per_minute") return ReadRate(value, field, &out->tokens_per_minute);
  if (field == "max_priority") {
    int priority = 0;
    if (!YAML::convert<int>::decode(value, priority) || std::abs(priority) > kMaxPriority) {
      return At(value, "max_priority must be a whole number, -{0} to {0}", kMaxPriority);
    }
    out->max_priority = priority;
    return absl::OkStatus();
  }
  const auto nearest = NearestName(field, Fields());
  return At(value, "there is no field '{}'{}", absl::CHexEscape(field),
            nearest ? fmt::format("; did you mean {}?", *nearest) : "");
}

absl::StatusOr<ApiKeyEntry> ReadEntry(const YAML::Node& node) {
  if (!node.IsMap()) return At(node, "an entry must have fields: name, sha256, ...");
  ApiKeyEntry entry;
  std::set<std::string> seen;
  for (const auto& pair : node) {
    const std::string field = pair.first.IsScalar() ? pair.first.Scalar() : "";
    if (!seen.insert(field).second) return At(pair.first, "{} stands there twice", field);
    TANDEM_RETURN_IF_ERROR(ReadField(field, pair.second, &entry));
  }
  if (entry.name.empty()) return At(node, "the entry has no name");
  if (entry.digests.empty()) return At(node, "{} has no sha256", entry.name);
  return entry;
}

absl::StatusOr<std::vector<ApiKeyEntry>> ReadEntries(const YAML::Node& root) {
  if (!root.IsSequence()) {
    return InvalidArgument("it must be a list of entries with name and sha256 (`tandem key new`)");
  }
  if (root.size() == 0 || root.size() > kMaxEntries) {
    return InvalidArgument("it must have 1 to {} entries, got {}", kMaxEntries, root.size());
  }
  std::vector<ApiKeyEntry> entries;
  std::set<std::string> names;
  std::set<std::string> digests;
  for (const YAML::Node& node : root) {
    TANDEM_ASSIGN_OR_RETURN(ApiKeyEntry entry, ReadEntry(node));
    if (!names.insert(entry.name).second) return At(node, "{} stands there twice", entry.name);
    for (const std::string& digest : entry.digests) {
      if (!digests.insert(digest).second) {
        return At(node, "a sha256 of {} stands there twice", entry.name);
      }
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

}  // namespace

absl::StatusOr<std::vector<ApiKeyEntry>> ParseApiKeys(const std::string& text) {
  try {
    return ReadEntries(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    return InvalidArgument("line {}: {}", error.mark.line + 1, error.msg);
  }
}

}  // namespace tandem::router
