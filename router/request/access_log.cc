#include "router/request/access_log.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "spdlog/spdlog.h"

#include "common/base/stage.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

constexpr auto kLevel = spdlog::level::info;

// What is wrong with these is told by limits and numbers. The others are texts of the client's, or
// go through a template that may put them into its message.
bool IsNumeric(std::string_view field) {
  constexpr std::array<std::string_view, 3> kPrefixes = {"sampling.", "options.", "token_ids"};
  return std::any_of(kPrefixes.begin(), kPrefixes.end(),
                     [&](std::string_view prefix) { return field.starts_with(prefix); });
}

}  // namespace

LogFields AccessFields(const AccessRecord& record) {
  LogFields out = {{"id", record.id}};
  const auto add = [&out](std::string name, int64_t count) {
    out.emplace_back(std::move(name), count);
  };
  if (!record.session.empty()) out.emplace_back("session", record.session);
  if (!record.key_name.empty()) out.emplace_back("key", record.key_name);
  if (record.trace.valid()) out.emplace_back("trace_id", record.trace.trace.ToHex());
  out.emplace_back("code", absl::StatusCodeToString(record.status.code()));
  add("prompt_tokens", record.prompt_tokens);
  add("cached_tokens", record.cached_tokens);
  add("generated_tokens", record.completion_tokens);
  if (record.drafts.drafted > 0) {
    add("drafted_tokens", record.drafts.drafted);
    add("accepted_tokens", record.drafts.accepted);
  }
  add("attempts", record.attempts);
  const Timing& timing = record.timing;
  if (!timing.decode_worker.empty()) out.emplace_back("decode_worker", timing.decode_worker);
  if (!timing.prefill_worker.empty()) out.emplace_back("prefill_worker", timing.prefill_worker);
  if (!timing.transport.empty()) out.emplace_back("transport", timing.transport);
  if (timing.kv_bytes > 0) add("kv_bytes", static_cast<int64_t>(timing.kv_bytes));
  if (timing.prefill_attempts > 1) add("prefill_attempts", timing.prefill_attempts);
  if (timing.preemptions > 0) add("preemptions", timing.preemptions);
  if (timing.migrations > 0) add("migrations", timing.migrations);
  for (const StageInfo& info : kStages) {
    const double ms = timing.stages[info.stage];
    if (ms > 0) out.emplace_back(std::string(info.name) + "_ms", ms);
  }
  if (record.status.ok()) return out;
  const std::vector<FieldViolation> violations = FieldViolations(record.status);
  if (!violations.empty()) out.emplace_back("field", violations.front().field);
  const bool quotes_nothing =
      std::all_of(violations.begin(), violations.end(),
                  [](const FieldViolation& violation) { return IsNumeric(violation.field); });
  if (quotes_nothing) out.emplace_back("error", MessageOf(record.status));
  return out;
}

void AccessLog::Write(const AccessRecord& record) {
  if (!spdlog::should_log(kLevel)) return;
  const bool unserved = record.attempts == 0;
  if (unserved && !unserved_.Allow()) return;
  LogFields fields = AccessFields(record);
  const uint64_t withheld = unserved ? unserved_.TakeWithheld() : 0;
  if (withheld > 0) fields.emplace_back("withheld_lines", static_cast<int64_t>(withheld));
  LogEvent(kLevel, "request", fields);
}

}  // namespace tandem::router
