// Byte-pair encoding of one piece of text.
//
// Immutable and thread-safe after construction. A piece starts as its bytes' symbols; as long as
// some neighbouring pair can merge, the pair of lowest rank merges, the leftmost of equals first.
// O(n log n) for a piece of n bytes; most pieces are tokens as a whole and cost one look-up.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "common/text/text_map.h"

namespace tandem {

// A merge: the tokens `left` and `right` become `result`. Its rank is its place in the list.
struct BpeMerge {
  int32_t left;
  int32_t right;
  int32_t result;
};

class BpeModel {
 public:
  // `byte_ids[b]` is the token of the single byte b; all ids are >= 0. Of two merges of the same
  // pair the later counts (so does Hugging Face).
  BpeModel(const std::array<int32_t, 256>& byte_ids, const std::vector<BpeMerge>& merges);

  void ReserveWholePieces(size_t n) { whole_pieces_.reserve(n); }
  // Makes pieces equal to `bytes` encode to `id` by one look-up. With `always` false only if
  // merging gives that as well.
  void AddWholePiece(std::string bytes, int32_t id, bool always);

  // Appends the tokens of `piece`, which has fewer than 2^31 bytes.
  void Encode(std::string_view piece, std::vector<int32_t>* ids) const;

 private:
  struct Ranked {
    uint32_t rank;
    int32_t result;
  };

  const Ranked* FindMerge(int32_t left, int32_t right) const;
  void EncodeShort(std::string_view piece, std::vector<int32_t>* ids) const;
  void EncodeLong(std::string_view piece, std::vector<int32_t>* ids) const;

  const std::array<int32_t, 256> byte_ids_;
  absl::flat_hash_map<uint64_t, Ranked> merges_;
  TextMap<int32_t> whole_pieces_;
};

}  // namespace tandem
