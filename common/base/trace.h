// Where a request's time went, process by process, in OpenTelemetry's words: a trace is one request
// as its client sees it, and made of spans; a span's context travels with a call, as W3C's
// `traceparent`, and what the callee does becomes its children.
//
// A process makes its spans of the stamps that timing and metrics are made of, and hands them over
// once the request has ended there. They hold names, counts and times, and nothing of what was
// asked or answered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/log.h"

namespace tandem {

// The headers, or metadata, that a context travels as.
inline constexpr char kTraceparentKey[] = "traceparent";
inline constexpr char kTracestateKey[] = "tracestate";

// A place in a trace: where a call comes from.
struct TraceContext {
  Hash128 trace;      // all zero: none
  uint64_t span = 0;  // 0: the trace has none yet
  bool sampled = false;
  std::string state;  // what tracers before us say to those behind us, as `tracestate` has it

  bool operator==(const TraceContext&) const = default;
  bool valid() const { return trace != Hash128{}; }
};

// "00-<trace>-<span>-<flags>" as https://www.w3.org/TR/trace-context says; no trace where it is
// anything else.
TraceContext ParseTraceparent(std::string_view text);
// The longest `tracestate` that is handed on.
inline constexpr size_t kMaxTracestate = 512;
// `text` if it is a list as the same page says, and no longer than that; else "".
std::string ParseTracestate(std::string_view text);
// `context` is valid and has a span.
std::string Traceparent(const TraceContext& context);

// The context of a request whose client traces nothing: a trace of its own for `ratio` of them, 0
// to 1, and none for the others.
TraceContext SampleTrace(double ratio);

enum class SpanKind { kInternal, kServer, kClient };

struct Span {
  std::string name;
  SpanKind kind = SpanKind::kInternal;
  TraceContext context;  // its own
  uint64_t parent = 0;   // 0: it is the trace's first
  absl::Time start;      // Clock
  absl::Time end;
  absl::StatusCode code = absl::StatusCode::kOk;
  LogFields attributes;
};

// Where spans go.
class SpanSink {
 public:
  virtual ~SpanSink() = default;
  // Thread-safe; never blocks: spans that find no room are dropped, and counted.
  virtual void Add(std::vector<Span> spans) = 0;
};

// The spans of one request in one process: its own, and below it one for each stage and call.
//
// Not thread-safe. Nothing goes out before End. A request that is computed over and over again has
// its first kMaxSpans.
class RequestTrace {
 public:
  static constexpr size_t kMaxSpans = 128;

  // `parent` is what the request came with. Null, so that nothing is recorded: its trace is not
  // sampled, or there is no sink. `sink` outlives this.
  static std::unique_ptr<RequestTrace> Begin(SpanSink* sink, const TraceContext& parent,
                                             std::string name, absl::Time start);

  const TraceContext& context() const { return own_.context; }
  // For a call that is about to be made: what the callee gets.
  TraceContext NewCall() const;

  // A stage that is over.
  void Add(std::string name, absl::Time start, absl::Time end, LogFields attributes = {},
           absl::StatusCode code = absl::StatusCode::kOk);
  // A call that is over; `context` as NewCall gave it.
  void AddCall(const TraceContext& context, std::string name, absl::Time start, absl::Time end,
               LogFields attributes, absl::StatusCode code);
  // The request has ended here so. The last call.
  void End(absl::Time end, absl::StatusCode code, LogFields attributes);

 private:
  RequestTrace(SpanSink* sink, Span own) : sink_(sink), own_(std::move(own)) {}
  void Push(Span span);

  SpanSink* const sink_;
  Span own_;
  std::vector<Span> below_;
};

}  // namespace tandem
