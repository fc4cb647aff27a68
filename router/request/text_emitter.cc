#include "router/request/text_emitter.h"

#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::router {

absl::StatusOr<TextEmitter> TextEmitter::Create(std::shared_ptr<const Tokenizer> tokenizer,
                                                std::vector<std::string> stops, int min_tokens) {
  TANDEM_CHECK(tokenizer != nullptr || stops.empty(), "stop strings need a tokenizer");
  std::optional<StopStringMatcher> matcher;
  if (!stops.empty()) {
    TANDEM_ASSIGN_OR_RETURN(matcher, StopStringMatcher::Create(std::move(stops), {}));
  }
  std::optional<IncrementalDetokenizer> detokenizer;
  if (tokenizer != nullptr) {
    detokenizer.emplace(std::move(tokenizer), /*skip_special_tokens=*/true);
  }
  return TextEmitter(std::move(detokenizer), std::move(matcher), min_tokens);
}

TextEmitter::Result TextEmitter::Push(int32_t token) {
  ++tokens_;
  if (!detokenizer_.has_value()) return {};
  std::string text = detokenizer_->Push(token);
  if (!matcher_.has_value() || tokens_ <= min_tokens_) return {std::move(text), false};
  StopStringMatcher::Result result = matcher_->Push(text);
  return {std::move(result.text), result.stopped};
}

std::string TextEmitter::Flush() { return matcher_.has_value() ? matcher_->Flush() : ""; }

}  // namespace tandem::router
