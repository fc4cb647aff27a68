#include "cli/key.h"

#include <cstdio>
#include <optional>
#include <string>

#include "absl/strings/escaping.h"
#include "fmt/format.h"

#include "common/auth/api_key.h"

namespace tandem::cli {
namespace {

struct KeyFlags {
  std::string what;
  std::string name;
  std::string tenant;
  std::optional<double> requests_per_minute;
  std::optional<double> tokens_per_minute;
  std::optional<int64_t> max_priority;
};

// "" if nothing is wrong.
std::string Mistake(const KeyFlags& flags) {
  constexpr char kNames[] = "1 to 64 letters, digits or . _ -";
  if (flags.what != "new") return fmt::format("there is `tandem key new`, not '{}'", flags.what);
  if (!IsKeyName(flags.name)) return fmt::format("--name must be {}", kNames);
  if (!flags.tenant.empty() && !IsKeyName(flags.tenant)) {
    return fmt::format("--tenant must be {}", kNames);
  }
  if (flags.requests_per_minute.value_or(1) <= 0 || flags.tokens_per_minute.value_or(1) <= 0) {
    return "--requests-per-minute and --tokens-per-minute must be above 0";
  }
  return "";
}

// Of the file of --api-keys-file (router/keys/api_keys_file.h).
std::string EntryText(const KeyFlags& flags, const std::string& key) {
  std::string out = fmt::format("- name: {}\n  sha256: {}\n", flags.name,
                                absl::BytesToHexString(ApiKeyDigest(key)));
  if (!flags.tenant.empty()) out += fmt::format("  tenant: {}\n", flags.tenant);
  if (flags.requests_per_minute) {
    out += fmt::format("  requests_per_minute: {}\n", *flags.requests_per_minute);
  }
  if (flags.tokens_per_minute) {
    out += fmt::format("  tokens_per_minute: {}\n", *flags.tokens_per_minute);
  }
  if (flags.max_priority) out += fmt::format("  max_priority: {}\n", *flags.max_priority);
  return out;
}

}  // namespace

int RunKey(const Arguments& arguments) {
  FlagSet parser("tandem key",
                 "Makes an API key. Its entry for the file of the router's --api-keys-file goes to "
                 "stdout; the key itself, which is stored nowhere, goes to stderr, this once.");
  KeyFlags flags;
  parser.AddPositional("new", &flags.what, "makes a key", /*required=*/true);
  parser.Add("--name", &flags.name, "whose key it is, in logs and metrics");
  parser.Add(
      "--tenant", &flags.tenant,
      "shares cached prefixes with keys of the same tenant only; default: with all that have "
      "none");
  parser.Add("--requests-per-minute", &flags.requests_per_minute, "default: no limit");
  parser.Add("--tokens-per-minute", &flags.tokens_per_minute,
             "of prompts and answers together; default: no limit");
  parser.Add("--max-priority", &flags.max_priority,
             "highest priority that its requests may have; default: the router's --max-priority");
  parser.Example("tandem key new --name team-a --requests-per-minute 600 >>keys.yaml");
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (const std::string mistake = Mistake(flags); !mistake.empty()) {
    Complain("tandem key: " + mistake);
    return kExitUsage;
  }
  const std::string key = NewApiKey();
  fmt::print("{}", EntryText(flags, key));
  std::fflush(stdout);
  fmt::print(stderr, "{}\n", key);
  return kExitOk;
}

}  // namespace tandem::cli
