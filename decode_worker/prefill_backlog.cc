#include "decode_worker/prefill_backlog.h"

#include <algorithm>
#include <utility>

namespace tandem::decode {

void PrefillBacklog::Insert(WorkArrived request, const Placement& place) {
  ++promised_.sequences;
  promised_.blocks += place.needed_blocks;
  const int priority = request.work.priority;
  const auto behind = std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiting& other) {
    return other.request.work.priority < priority;
  });
  waiting_.insert(behind, Waiting{std::move(request), place});
}

WorkArrived PrefillBacklog::Take(List::iterator waiting) {
  --promised_.sequences;
  promised_.blocks -= waiting->place.needed_blocks;
  WorkArrived request = std::move(waiting->request);
  waiting_.erase(waiting);
  return request;
}

Promised PrefillBacklog::HeldBack(absl::Time now) const {
  for (const Waiting& waiting : waiting_) {
    if (now >= waiting.lacks_room + kPatience) return {1, waiting.place.needed_blocks};
  }
  return {};
}

std::map<std::string, int64_t> PrefillBacklog::Tokens() const {
  std::map<std::string, int64_t> tokens;
  for (const Waiting& waiting : waiting_) tokens[waiting.worker()] += waiting.place.tokens;
  return tokens;
}

}  // namespace tandem::decode
