// What the numbers of tandem.v1.SamplingParams may be, written once: the router refuses what a
// client sends outside of them, workers refuse it from any peer. A test compares the names with the
// message.
#pragma once

#include <array>
#include <string_view>

namespace tandem {

// A float field of SamplingParams.
struct SamplingRange {
  std::string_view name;  // the field's
  float low;
  bool low_included;
  float high;                 // included
  std::string_view accepted;  // the range in words, for "must be ..."

  // False for NaN, because every comparison with NaN is.
  constexpr bool Contains(float value) const {
    return (low_included ? value >= low : value > low) && value <= high;
  }
};

inline constexpr float kLargestFinite = 3.4e38f;
inline constexpr std::array<SamplingRange, 6> kSamplingRanges = {{
    {"temperature", 0, true, kLargestFinite, "a finite number >= 0 (0 is greedy)"},
    {"top_p", 0, false, 1, "in (0, 1]"},
    {"min_p", 0, true, 1, "in [0, 1]"},
    {"repetition_penalty", 0, false, 10, "in (0, 10]"},
    {"presence_penalty", -2, true, 2, "in [-2, 2]"},
    {"frequency_penalty", -2, true, 2, "in [-2, 2]"},
}};

inline constexpr int kMinTopK = -1;  // 0 and -1: all tokens
// Most alternatives that logprobs and prompt_logprobs may ask for.
inline constexpr int kMaxLogprobs = 20;
// Most stop_token_ids that a client may give.
inline constexpr int kMaxStopTokenIds = 128;

}  // namespace tandem
