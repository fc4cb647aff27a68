// What the client has not been sent yet: everything since the last message, merged into one.
//
// A plain value; not thread-safe. full() is what back-pressure hangs on: the decode worker is not
// read on until the client has taken a message. One event may be appended beyond the bound.
#pragma once

#include <cstddef>
#include <string>

#include "router/request/request.h"

namespace tandem::router {

class PendingResponse {
 public:
  static constexpr size_t kMaxTokens = 256;
  static constexpr size_t kMaxTextBytes = 64 << 10;

  // The event's tokens and logprobs, and the text they became; or its progress, which tokens
  // overtake. Finish reason, counts and timing of the event are not taken over.
  void Append(TokenEvent event, const std::string& text);
  void AppendText(const std::string& text) { response_.text += text; }
  void SetFinishReason(FinishReason reason) { response_.finish_reason = reason; }
  void Clear() { response_ = {}; }

  // Nothing that the client would want a message for.
  bool empty() const;
  bool full() const;
  GenerateResponse Take();

 private:
  GenerateResponse response_;
};

}  // namespace tandem::router
