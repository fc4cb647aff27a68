#include "decode_worker/token_stream.h"

#include <iterator>
#include <utility>

#include "common/base/check.h"

namespace tandem::decode {
namespace {

template <typename T>
void MoveAppend(std::vector<T>* to, std::vector<T> from) {
  to->insert(to->end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

TokenStream::TokenStream(std::function<void()> wake, std::function<void()> on_drained)
    : wake_(std::move(wake)), on_drained_(std::move(on_drained)) {}

bool TokenStream::TakeIdle() { return std::exchange(idle_, false); }

bool TokenStream::Append(TokenEvent event) {
  absl::MutexLock lock(&mutex_);
  TANDEM_CHECK(!end_.has_value(), "tokens after the end of a stream");
  if (!pending_.has_value()) {
    pending_ = std::move(event);
  } else {
    MoveAppend(&pending_->token_ids, std::move(event.token_ids));
    MoveAppend(&pending_->logprobs, std::move(event.logprobs));
    MoveAppend(&pending_->prompt_logprobs, std::move(event.prompt_logprobs));
    pending_->finish_reason = event.finish_reason;
    pending_->cached_tokens = event.cached_tokens;
    pending_->computed_tokens = event.computed_tokens;  // tokens overtake it
    pending_->drafts.Add(event.drafts);
    if (event.timing.has_value()) pending_->timing = std::move(event.timing);
  }
  return TakeIdle();
}

bool TokenStream::End(absl::Status status) {
  absl::MutexLock lock(&mutex_);
  TANDEM_CHECK(!end_.has_value(), "a stream ends once");
  end_ = std::move(status);
  return TakeIdle();
}

void TokenStream::Wake() {
  // Without the lock: the taker calls Take().
  if (wake_) wake_();
}

size_t TokenStream::pending() const {
  absl::MutexLock lock(&mutex_);
  return pending_.has_value() ? pending_->token_ids.size() : 0;
}

void TokenStream::NotifyWhenDrained() {
  absl::MutexLock lock(&mutex_);
  notify_drained_ = true;
}

TokenStream::Item TokenStream::Take() {
  Item item;
  bool drained;
  {
    absl::MutexLock lock(&mutex_);
    if (pending_.has_value()) {
      item = *std::exchange(pending_, std::nullopt);
    } else if (end_.has_value()) {
      return *end_;
    } else {
      idle_ = true;
      return item;
    }
    drained = std::exchange(notify_drained_, false);
  }
  if (drained && on_drained_) on_drained_();
  return item;
}

}  // namespace tandem::decode
