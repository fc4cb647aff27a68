#include "common/text/detokenizer.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "common/text/utf8.h"

namespace tandem {

std::string IncrementalDetokenizer::Push(std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    if (skip_special_tokens_ && tokenizer_->IsSpecial(id)) continue;
    pending_.append(tokenizer_->TokenBytes(id));
  }
  std::string text;
  pending_.erase(0, AppendLossyUtf8(pending_, /*final=*/false, &text));
  return text;
}

std::string IncrementalDetokenizer::Flush() {
  std::string text;
  AppendLossyUtf8(pending_, /*final=*/true, &text);
  pending_.clear();
  return text;
}

absl::StatusOr<StopStringMatcher> StopStringMatcher::Create(std::vector<std::string> stops,
                                                            Options options) {
  std::vector<Stop> prepared;
  for (size_t i = 0; i < stops.size(); ++i) {
    const std::string& text = stops[i];
    if (text.empty()) return InvalidArgument("stop[{}] must not be empty", i);
    if (const auto bad = FindInvalidUtf8(text); bad.has_value()) {
      return InvalidArgument("stop[{}] is not valid UTF-8 at byte {}", i, *bad);
    }
    std::vector<uint32_t> border(text.size(), 0);
    for (size_t j = 1; j < text.size(); ++j) {
      uint32_t k = border[j - 1];
      while (k > 0 && text[j] != text[k]) k = border[k - 1];
      border[j] = text[j] == text[k] ? k + 1 : 0;
    }
    prepared.push_back({std::move(stops[i]), std::move(border), 0});
  }
  return StopStringMatcher(std::move(prepared), options);
}

StopStringMatcher::Result StopStringMatcher::Push(std::string_view text) {
  Result result;
  if (stopped_) return result;
  const size_t held_before = held_.size();
  held_.append(text);
  for (size_t i = held_before; i < held_.size(); ++i) {
    size_t found = stops_.size();
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      while (stop.matched > 0 && stop.text[stop.matched] != held_[i]) {
        stop.matched = stop.border[stop.matched - 1];
      }
      if (stop.text[stop.matched] == held_[i]) ++stop.matched;
      if (stop.matched < stop.text.size()) continue;
      if (found == stops_.size() || stop.text.size() > stops_[found].text.size()) found = s;
    }
    if (found == stops_.size()) continue;
    stopped_ = true;
    const size_t end = i + 1;
    held_.resize(options_.include_stop ? end : end - stops_[found].text.size());
    return {std::exchange(held_, {}), true, found};
  }
  uint32_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max(keep, stop.matched);
  result.text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return result;
}

std::string StopStringMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace tandem
