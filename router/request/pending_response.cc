#include "router/request/pending_response.h"

#include <iterator>
#include <utility>
#include <vector>

namespace tandem::router {
namespace {

template <typename T>
void MoveTo(std::vector<T> from, std::vector<T>* to) {
  to->insert(to->end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

void PendingResponse::Append(TokenEvent event, const std::string& text) {
  response_.text += text;
  response_.computed_tokens = event.computed_tokens;
  MoveTo(std::move(event.token_ids), &response_.token_ids);
  MoveTo(std::move(event.logprobs), &response_.logprobs);
  MoveTo(std::move(event.prompt_logprobs), &response_.prompt_logprobs);
}

bool PendingResponse::empty() const {
  return response_.token_ids.empty() && response_.text.empty() &&
         response_.finish_reason == FinishReason::kNone && !response_.computed_tokens.has_value();
}

bool PendingResponse::full() const {
  return response_.token_ids.size() >= kMaxTokens || response_.text.size() >= kMaxTextBytes;
}

GenerateResponse PendingResponse::Take() { return std::exchange(response_, {}); }

}  // namespace tandem::router
