// Reads a Hugging Face tokenizer.json into plain tables, refusing whatever Tokenizer does not
// implement.
//
// Pure function, thread-safe. Errors are InvalidArgument "tokenizer.json: <JSON path>: ...". What
// is read: `model` (type BPE with all 256 byte symbols in its vocabulary), `added_tokens`,
// `normalizer` (NFC or null), `pre_tokenizer` (Splits by a regular expression, Isolated, and
// Digits, followed by ByteLevel), `decoder` (ByteLevel) and `post_processor` (null, ByteLevel,
// TemplateProcessing, or a Sequence of those). `truncation` and `padding` are ignored: they are how
// a text is batched, not how it is read.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

#include "common/text/added_tokens.h"
#include "common/text/bpe.h"

namespace tandem {

// Ids must be below this: tables are dense, so one absurd id must not cost gigabytes.
inline constexpr int32_t kMaxTokenIds = 1 << 22;

struct TokenizerFile {
  struct Token {
    std::string text;  // as in the file: byte-level symbols
    int32_t id;
  };
  std::vector<Token> vocab;  // ascending ids, no two equal
  std::vector<BpeMerge> merges;
  std::array<int32_t, 256> byte_ids;
  std::vector<AddedToken> added_tokens;  // no empty contents, no two equal
  // Regular expressions that cut a text one after the other, each the pieces of the one before.
  std::vector<std::string> split_regexes;
  // What stands before and behind a single text (TemplateProcessing): ids of special tokens.
  std::vector<int32_t> prefix_ids;
  std::vector<int32_t> suffix_ids;
  bool nfc = false;
  bool ignore_merges = false;
};

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json_text);

}  // namespace tandem
