// Text to token ids and back, equal to Hugging Face `tokenizers` for byte-level BPE models (those
// of Qwen, Llama 3 and their like).
//
// Immutable after construction; every method is thread-safe and runs in the caller's thread.
//
// Encoding: added tokens that match raw text are cut out first; the rest is normalised (NFC, if the
// file says so) piece by piece, added tokens that match normalised text are cut out, and what
// remains is cut by the split patterns into pieces that are byte-pair encoded one by one. See
// tokenizer_file.h for what of tokenizer.json is supported.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/text/added_tokens.h"
#include "common/text/bpe.h"
#include "common/text/split_pattern.h"
#include "common/text/text_map.h"

namespace tandem {

struct TokenizerFile;

// A stretch of a prompt. Added and special tokens are recognised only inside stretches with
// parse_special: a user who types
// "<|im_end|>" into a chat gets it as plain text.
struct TextSegment {
  std::string text;
  bool parse_special = false;
};

class Tokenizer {
 public:
  // NotFound if there is no such file; else as Parse, with the path in the message.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(
      const std::string& tokenizer_json_path);
  // InvalidArgument naming the JSON path (or byte position) of whatever is malformed or not
  // supported.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Parse(std::string_view json);

  // Appends the ids of all segments read as ONE text: merging and splitting run across their
  // borders, only added tokens do not. InvalidArgument naming the byte offset for text that is not
  // UTF-8 or is over kMaxTextBytes; ResourceExhausted if the file's split pattern backtracks beyond
  // all reason. On error `ids` is as it was.
  absl::Status Encode(std::span<const TextSegment> segments, std::vector<int32_t>* ids) const;
  absl::Status Encode(std::string_view text, bool parse_special, std::vector<int32_t>* ids) const;

  // What the model's texts begin and end with (`<|begin_of_text|>`): Hugging Face adds these ids to
  // a plain prompt, but not to one that a chat template rendered, which spells them itself.
  std::span<const int32_t> prefix_ids() const { return prefix_ids_; }
  std::span<const int32_t> suffix_ids() const { return suffix_ids_; }

  // The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids that are no tokens are skipped,
  // as Hugging Face does.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  // The bytes that `id` stands for, possibly a part of a character; empty for an id that is no
  // token.
  std::string_view TokenBytes(int32_t id) const {
    return IsToken(id) ? std::string_view(tokens_[id].bytes) : std::string_view();
  }
  // The id of a token written as in tokenizer.json: an added token's content or byte-level symbols
  // ("Ġthe").
  std::optional<int32_t> TokenToId(std::string_view token) const;
  bool IsToken(int32_t id) const { return id >= 0 && id < vocab_size() && tokens_[id].exists; }
  bool IsSpecial(int32_t id) const { return IsToken(id) && tokens_[id].special; }

  // Largest id + 1. A model's vocabulary may be larger (padded), ids may have gaps.
  int32_t vocab_size() const { return static_cast<int32_t>(tokens_.size()); }
  // Length of the longest token: a text of n bytes has at least n / max_token_bytes() tokens, but
  // for white space that added tokens with lstrip or rstrip swallow and for what NFC shortens (at
  // most to a third).
  size_t max_token_bytes() const { return max_token_bytes_; }
  // 32 hex digits, equal for files that tokenise equally however they are laid out (XXH3-128 over
  // the tables).
  const std::string& digest() const { return digest_; }

  static constexpr size_t kMaxTextBytes = size_t{1} << 30;

 private:
  struct Token {
    std::string bytes;
    bool exists = false;
    bool special = false;
  };

  Tokenizer(TokenizerFile file, std::vector<SplitPattern> splits);

  void AddTokens(const TokenizerFile& file);
  absl::Status EncodeText(std::string_view text, std::span<const TextRange> special,
                          std::vector<int32_t>* ids) const;
  // Text between added tokens that match raw text: normalises, then cuts at those that match
  // normalised text.
  absl::Status EncodeRaw(std::string_view raw, size_t offset, std::span<const TextRange> special,
                         std::vector<int32_t>* ids) const;
  absl::Status EncodePlain(std::string_view text, std::vector<int32_t>* ids) const;

  std::vector<Token> tokens_;  // by id
  TextMap<int32_t> id_by_token_;
  BpeModel bpe_;
  std::vector<SplitPattern> splits_;
  std::vector<int32_t> prefix_ids_;
  std::vector<int32_t> suffix_ids_;
  AddedTokenMatcher raw_matcher_;
  AddedTokenMatcher normalized_matcher_;
  bool nfc_;
  size_t max_token_bytes_ = 1;
  std::string digest_;
};

}  // namespace tandem
