// Token ids to text as they arrive, and holding back what may be a stop string.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

#include "common/text/tokenizer.h"

namespace tandem {

// Turns a stream of token ids into whole UTF-8 characters.
//
// Not thread-safe: one per stream, one thread at a time. All texts returned, joined, equal
// Tokenizer::Decode of all ids. A character whose bytes are spread over several tokens comes out
// with the token that completes it; bytes that can no longer become a character come out as U+FFFD
// at once. Holds at most three bytes.
class IncrementalDetokenizer {
 public:
  IncrementalDetokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
      : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

  std::string Push(std::span<const int32_t> ids);
  std::string Push(int32_t id) { return Push(std::span(&id, 1)); }

  // Ends the stream: a character that was begun and never completed comes out as U+FFFD. The object
  // may then be used anew.
  std::string Flush();

 private:
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const bool skip_special_tokens_;
  std::string pending_;  // the bytes of an incomplete character
};

// Looks for stop strings in a stream of text.
//
// Not thread-safe. Text that may be the beginning of a stop string is held back until more text
// decides. The match that ends first counts; of several that end at the same byte the longest. Time
// per byte is O(number of stop strings), memory is that of the stop strings.
class StopStringMatcher {
 public:
  struct Options {
    bool include_stop = false;  // whether the text given out ends with the stop string
  };
  struct Result {
    std::string text;       // to be given out now
    bool stopped = false;   // a stop string was found: `text` is the last of the stream
    size_t stop_index = 0;  // which one, if stopped
  };

  // InvalidArgument "stop[i] ..." for a stop string that is empty or not UTF-8.
  static absl::StatusOr<StopStringMatcher> Create(std::vector<std::string> stops, Options options);

  // `text` is whole UTF-8. After a stop nothing more comes out.
  Result Push(std::string_view text);

  // Ends the stream: what was held back comes out, unless a stop string was found.
  std::string Flush();

 private:
  // Knuth-Morris-Pratt: how much of `text` the stream's end matches.
  struct Stop {
    std::string text;
    std::vector<uint32_t>
        border;  // of each prefix: its longest proper suffix that is also its prefix
    uint32_t matched = 0;
  };

  StopStringMatcher(std::vector<Stop> stops, Options options)
      : stops_(std::move(stops)), options_(options) {}

  std::vector<Stop> stops_;
  Options options_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace tandem
