// The log of a process on stderr: one format for all processes, as text or as JSON, a line per
// entry whatever bytes it holds. The code logs with spdlog, which writes where this says, and with
// LogEvent.
//
//   2026-11-28T22:54:02.123Z info  router: worker decode-0 joined
//   {"time":"2026-11-28T22:54:02.123Z","level":"info","process":"router","message":"worker ..."}
//
// Lines are written by a thread of their own (LogWriter): logging costs a hot thread microseconds,
// under a lock too, and never waits for a reader. What strangers can cause is bounded by
// LogLimiter.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "spdlog/common.h"

namespace tandem {

enum class LogFormat { kText, kJson };

// Mirrors the flags of the same names (common/config/log_flags.h).
struct LogOptions {
  std::string log_level = "info";   // debug, info, warn, error
  std::string log_format = "text";  // text, json
};

// What an entry says beside its message, in this order. Names are identifiers.
using LogFields = std::vector<std::pair<std::string, std::variant<std::string, int64_t, double>>>;

// From here on this process logs as `process`. Once, before there are threads that log.
void StartLog(const std::string& process, const LogOptions& options);
// Waits, for a bounded time, until all that was logged is on stderr: before the process writes
// there by other means, or ends.
void FlushLog();
// For main(): `why`, as the last line on stderr, in the log's format if that was started.
void ReportFailure(const std::string& program, std::string_view why);

// An entry with fields: "message key=value ..." in text, members of the object in JSON.
// Thread-safe.
void LogEvent(spdlog::level::level_enum level, std::string_view message, const LogFields& fields);

// One entry as a line with its newline. Pure.
std::string LogLine(LogFormat format, absl::Time time, std::string_view level,
                    std::string_view process, std::string_view message,
                    const LogFields& fields = {});

}  // namespace tandem
