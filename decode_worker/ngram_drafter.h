// Drafts without a second model (prompt lookup): what followed the sequence's last tokens when they
// stood in it before. An answer that edits, quotes or continues a given text mostly goes on as the
// text did.
//
// The last occurrences of the last kShortestMatch tokens are looked at, at most kCandidates of
// them; the draft is what followed the one that agrees with the sequence's end over the most tokens
// (up to kLongestMatch, the newest of equals). Where the occurrence reaches into the end itself, as
// when a line is repeated, the draft goes on with its own tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "decode_worker/drafter.h"

namespace tandem::decode {

// Takes constant time per token and per proposal, and about 30 bytes per token of the sequence.
class NgramDrafter final : public Drafter {
 public:
  static constexpr int kShortestMatch = 2;
  static constexpr int kLongestMatch = 32;
  static constexpr int kCandidates = 16;

  // The evidence is the number of tokens that agree.
  Draft Propose(std::span<const int32_t> tokens, int most) override;

 private:
  // Indexes the pairs that something follows.
  void KeepUp(std::span<const int32_t> tokens);

  absl::flat_hash_map<uint64_t, int32_t> last_;  // where a pair of tokens ended last
  std::vector<int32_t> before_;                  // by position: where its pair ended before; -1
};

}  // namespace tandem::decode
