#include "common/base/trace.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "fmt/format.h"

#include "common/base/transfer_id.h"

namespace tandem {
namespace {

constexpr uint8_t kSampledFlag = 1;

// Exactly the lower-case hex digits of `text`; false for others.
template <typename Number>
bool ParseHex(std::string_view text, Number* out) {
  const bool hex = std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
  return hex && std::from_chars(text.data(), text.data() + text.size(), *out, 16).ec == std::errc();
}

bool IsStateKey(std::string_view key) {
  const auto plain = [](char c) { return absl::ascii_islower(c) || absl::ascii_isdigit(c); };
  return !key.empty() && key.size() <= 256 && plain(key.front()) &&
         std::all_of(key.begin(), key.end(), [&](char c) {
           return plain(c) || std::string_view("_-*/@").find(c) != std::string_view::npos;
         });
}

bool IsStateValue(std::string_view value) {
  return !value.empty() && value.size() <= 256 && value.find('=') == std::string_view::npos;
}

uint64_t NewSpanId() {
  uint64_t id = 0;
  while (id == 0) id = RandomUint64();
  return id;
}

}  // namespace

TraceContext ParseTraceparent(std::string_view text) {
  constexpr size_t kLength = 55;
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return {};
  uint8_t version = 0, flags = 0;
  TraceContext context;
  if (!ParseHex(text.substr(0, 2), &version) ||
      !ParseHex(text.substr(3, 16), &context.trace.high) ||
      !ParseHex(text.substr(19, 16), &context.trace.low) ||
      !ParseHex(text.substr(36, 16), &context.span) || !ParseHex(text.substr(53, 2), &flags)) {
    return {};
  }
  // Versions to come may say more behind it, but not less, and never 255.
  if (version == 255 || context.span == 0) return {};
  if (text.size() > kLength && (version == 0 || text[kLength] != '-')) return {};
  context.sampled = (flags & kSampledFlag) != 0;
  return context;
}

std::string ParseTracestate(std::string_view text) {
  constexpr size_t kMaxMembers = 32;
  // Metadata of gRPC has no tabs, which a header may have between members.
  if (text.size() > kMaxTracestate || !std::all_of(text.begin(), text.end(), absl::ascii_isprint)) {
    return "";
  }
  std::set<std::string> keys;
  for (std::string& member : std::vector<std::string>(absl::StrSplit(std::string(text), ','))) {
    absl::StripAsciiWhitespace(&member);
    if (member.empty()) continue;
    const size_t equals = member.find('=');
    if (equals == member.npos) return "";
    const std::string key = member.substr(0, equals);
    if (!IsStateKey(key) || !IsStateValue(member.substr(equals + 1)) || !keys.insert(key).second) {
      return "";
    }
  }
  return keys.empty() || keys.size() > kMaxMembers ? "" : std::string(text);
}

std::string Traceparent(const TraceContext& context) {
  return fmt::format("00-{}-{:016x}-{:02x}", context.trace.ToHex(), context.span,
                     context.sampled ? kSampledFlag : 0);
}

TraceContext SampleTrace(double ratio) {
  TraceContext context;
  context.trace = {RandomUint64(), RandomUint64()};
  // By the id itself, so that whoever samples by the same rule takes the same traces.
  context.sampled = ratio >= 1 || std::ldexp(static_cast<double>(context.trace.low), -64) < ratio;
  return context.sampled ? context : TraceContext{};
}

std::unique_ptr<RequestTrace> RequestTrace::Begin(SpanSink* sink, const TraceContext& parent,
                                                  std::string name, absl::Time start) {
  if (sink == nullptr || !parent.valid() || !parent.sampled) return nullptr;
  Span own;
  own.name = std::move(name);
  own.kind = SpanKind::kServer;
  own.context = parent;
  own.context.span = NewSpanId();
  own.parent = parent.span;
  own.start = start;
  return std::unique_ptr<RequestTrace>(new RequestTrace(sink, std::move(own)));
}

TraceContext RequestTrace::NewCall() const {
  TraceContext context = own_.context;
  context.span = NewSpanId();
  return context;
}

void RequestTrace::Add(std::string name, absl::Time start, absl::Time end, LogFields attributes,
                       absl::StatusCode code) {
  Push({std::move(name), SpanKind::kInternal, NewCall(), 0, start, end, code,
        std::move(attributes)});
}

void RequestTrace::AddCall(const TraceContext& context, std::string name, absl::Time start,
                           absl::Time end, LogFields attributes, absl::StatusCode code) {
  Push({std::move(name), SpanKind::kClient, context, 0, start, end, code, std::move(attributes)});
}

void RequestTrace::Push(Span span) {
  if (below_.size() + 1 >= kMaxSpans) return;
  span.parent = own_.context.span;
  below_.push_back(std::move(span));
}

void RequestTrace::End(absl::Time end, absl::StatusCode code, LogFields attributes) {
  own_.end = end;
  own_.code = code;
  own_.attributes = std::move(attributes);
  below_.push_back(std::move(own_));
  sink_->Add(std::move(below_));
}

}  // namespace tandem
