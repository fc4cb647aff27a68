#include "common/base/log.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <unistd.h>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "spdlog/formatter.h"
#include "spdlog/sinks/sink.h"
#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/log_writer.h"

namespace tandem {
namespace {

// Of lines that nobody reads.
constexpr size_t kMaxWaitingBytes = 1 << 20;
// How long the end of a process waits for a reader.
constexpr absl::Duration kLastLines = absl::Seconds(2);

std::string_view LevelName(spdlog::level::level_enum level) {
  switch (level) {
    case spdlog::level::trace:
    case spdlog::level::debug:
      return "debug";
    case spdlog::level::warn:
      return "warn";
    case spdlog::level::err:
    case spdlog::level::critical:
      return "error";
    default:
      return "info";
  }
}

using Json = nlohmann::ordered_json;

// On one line, whatever bytes the strings hold.
std::string Dump(const Json& json) {
  return json.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

std::string TimeText(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d%ET%H:%M:%E3SZ", time, absl::UTCTimeZone());
}

// Without control characters, which would begin a line or move a terminal's cursor.
std::string OneLine(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out;
}

// A value that could be taken for more than one stands in quotes.
std::string Word(const std::string& text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return c > ' ' && c != 0x7f && c != '"' && c != '=' && c != '\\';
  });
  return plain ? text : Dump(text);
}

// Times and shares need no more digits than somebody reads.
double Rounded(double value) {
  const double thousandths = value * 1000;
  return thousandths > -1e15 && thousandths < 1e15
             ? static_cast<double>(static_cast<int64_t>(thousandths + (value < 0 ? -0.5 : 0.5))) /
                   1000
             : value;
}

std::string TextOf(const std::variant<std::string, int64_t, double>& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return Word(*text);
  if (const auto* number = std::get_if<int64_t>(&value)) return std::to_string(*number);
  return fmt::format("{}", Rounded(std::get<double>(value)));
}

Json JsonOf(const std::variant<std::string, int64_t, double>& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* number = std::get_if<int64_t>(&value)) return *number;
  return Rounded(std::get<double>(value));
}

// " key=value" for each.
std::string TextOf(const LogFields& fields) {
  std::string out;
  for (const auto& [name, value] : fields) out += fmt::format(" {}={}", name, TextOf(value));
  return out;
}

class LineSink final : public spdlog::sinks::sink {
 public:
  LineSink(std::string process, LogFormat format)
      : process_(std::move(process)),
        format_(format),
        writer_(STDERR_FILENO, kMaxWaitingBytes, [this](uint64_t lost) {
          return Line(absl::Now(), spdlog::level::warn,
                      fmt::format("{} lines are missing here: nobody read stderr", lost), {});
        }) {}

  void log(const spdlog::details::log_msg& entry) override {
    writer_.Write(Line(absl::FromChrono(entry.time), entry.level,
                       {entry.payload.data(), entry.payload.size()}, {}));
  }
  void Event(spdlog::level::level_enum level, std::string_view message, const LogFields& fields) {
    writer_.Write(Line(absl::Now(), level, message, fields));
  }
  void flush() override { writer_.Drain(kLastLines); }
  void set_pattern(const std::string&) override {}
  void set_formatter(std::unique_ptr<spdlog::formatter>) override {}

  std::string Line(absl::Time time, spdlog::level::level_enum level, std::string_view message,
                   const LogFields& fields) const {
    return LogLine(format_, time, LevelName(level), process_, message, fields);
  }
  LogFormat format() const { return format_; }

 private:
  const std::string process_;
  const LogFormat format_;
  LogWriter writer_;
};

// Of this process, from StartLog on; never destroyed, because threads log until the end.
std::atomic<LineSink*> g_sink = nullptr;

}  // namespace

void StartLog(const std::string& process, const LogOptions& options) {
  TANDEM_CHECK(g_sink == nullptr, "StartLog is called once");
  const LogFormat format = options.log_format == "json" ? LogFormat::kJson : LogFormat::kText;
  // The registry of spdlog, and so the sink, live as long as the process.
  static auto* const sink = new std::shared_ptr<LineSink>(new LineSink(process, format));
  g_sink = sink->get();
  auto logger = std::make_shared<spdlog::logger>(process, *sink);
  logger->set_level(spdlog::level::from_str(options.log_level));
  // gRPC ends the process after one of these.
  logger->flush_on(spdlog::level::critical);
  spdlog::set_default_logger(std::move(logger));
}

void FlushLog() {
  if (LineSink* const sink = g_sink) sink->flush();
}

void ReportFailure(const std::string& program, std::string_view why) {
  LineSink* const sink = g_sink;
  if (sink != nullptr && sink->format() == LogFormat::kJson) {
    sink->Event(spdlog::level::err, why, {});
    return sink->flush();
  }
  FlushLog();
  fmt::print(stderr, "{}: {}\n", program, why);
}

void LogEvent(spdlog::level::level_enum level, std::string_view message, const LogFields& fields) {
  spdlog::logger* const logger = spdlog::default_logger_raw();
  if (!logger->should_log(level)) return;
  if (LineSink* const sink = g_sink) return sink->Event(level, message, fields);
  logger->log(level, "{}{}", message, TextOf(fields));
}

std::string LogLine(LogFormat format, absl::Time time, std::string_view level,
                    std::string_view process, std::string_view message, const LogFields& fields) {
  if (format == LogFormat::kText) {
    return fmt::format("{} {:<5} {}: {}{}\n", TimeText(time), level, OneLine(process),
                       OneLine(message), TextOf(fields));
  }
  Json line = {
      {"time", TimeText(time)}, {"level", level}, {"process", process}, {"message", message}};
  for (const auto& [name, value] : fields) line[name] = JsonOf(value);
  return Dump(line) + "\n";
}

}  // namespace tandem
