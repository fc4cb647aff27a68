// Keeps what it gets. Used by one thread.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "common/base/trace.h"

namespace tandem {

class RecordedSpans final : public SpanSink {
 public:
  void Add(std::vector<Span> spans) override { traces.push_back(std::move(spans)); }
  // "name [from, to] code" of the last request's, in ms since `start`, in the order that they came.
  std::vector<std::string> Lines(absl::Time start) const {
    std::vector<std::string> out;
    if (traces.empty()) return out;
    for (const Span& span : traces.back()) {
      out.push_back(fmt::format(
          "{} [{}, {}] {}", span.name, absl::ToInt64Milliseconds(span.start - start),
          absl::ToInt64Milliseconds(span.end - start), absl::StatusCodeToString(span.code)));
    }
    return out;
  }

  std::vector<std::vector<Span>> traces;  // by request
};

}  // namespace tandem
