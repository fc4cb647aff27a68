// Tokens of one response to the text that the client may see.
//
// Not thread-safe. Stop strings are looked for only in text of tokens after the first `min_tokens`.
// Without a tokenizer there is no text.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/text/detokenizer.h"
#include "common/text/tokenizer.h"

namespace tandem::router {

class TextEmitter {
 public:
  // `tokenizer` may be null; `stops` must be empty then. Errors name stop[i].
  static absl::StatusOr<TextEmitter> Create(std::shared_ptr<const Tokenizer> tokenizer,
                                            std::vector<std::string> stops, int min_tokens);

  struct Result {
    std::string text;
    bool stopped = false;  // this token completed a stop string
  };
  Result Push(int32_t token);
  // Ends the stream without a stop string: what was held back of whole characters. One that the
  // last token leaves incomplete is not text; its bytes are in the token ids.
  std::string Flush();

 private:
  TextEmitter(std::optional<IncrementalDetokenizer> detokenizer,
              std::optional<StopStringMatcher> matcher, int min_tokens)
      : detokenizer_(std::move(detokenizer)),
        matcher_(std::move(matcher)),
        min_tokens_(min_tokens) {}

  std::optional<IncrementalDetokenizer> detokenizer_;
  std::optional<StopStringMatcher> matcher_;
  int min_tokens_;
  int tokens_ = 0;
};

}  // namespace tandem::router
