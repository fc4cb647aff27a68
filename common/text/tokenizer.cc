#include "common/text/tokenizer.h"

#define XXH_INLINE_ALL
#include <algorithm>
#include <utility>
#include <xxhash.h>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/byte_level.h"
#include "common/text/nfc.h"
#include "common/text/tokenizer_file.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr size_t kMaxTokenizerFileBytes = size_t{256} << 20;

// What a token decodes to: the bytes of its byte-level symbols, or itself if it has other
// characters.
std::string DecodedBytes(const std::string& token) { return BytesOfSymbols(token).value_or(token); }

// The added tokens with the given `normalized`, ready to match against normalised text where they
// are.
std::vector<AddedToken> Select(const TokenizerFile& file, bool normalized) {
  std::vector<AddedToken> selected;
  for (const AddedToken& token : file.added_tokens) {
    if (token.normalized != normalized) continue;
    selected.push_back(token);
    if (normalized && file.nfc) selected.back().content = ToNfc(token.content);
  }
  return selected;
}

// Hash over everything that decides which ids a text gets.
class TableHash {
 public:
  TableHash() { XXH3_128bits_reset(&state_); }
  void Add(int64_t value) { XXH3_128bits_update(&state_, &value, sizeof(value)); }
  void Add(std::string_view text) {
    Add(static_cast<int64_t>(text.size()));
    XXH3_128bits_update(&state_, text.data(), text.size());
  }
  std::string Hex() {
    const XXH128_hash_t hash = XXH3_128bits_digest(&state_);
    return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
  }

 private:
  XXH3_state_t state_;
};

std::string DigestOf(const TokenizerFile& file) {
  TableHash hash;
  hash.Add(static_cast<int64_t>(file.vocab.size()));
  for (const auto& token : file.vocab) {
    hash.Add(token.id);
    hash.Add(token.text);
  }
  hash.Add(static_cast<int64_t>(file.merges.size()));
  for (const BpeMerge& merge : file.merges) {
    hash.Add(merge.left);
    hash.Add(merge.right);
  }
  std::vector<AddedToken> added = file.added_tokens;
  std::sort(added.begin(), added.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  hash.Add(static_cast<int64_t>(added.size()));
  for (const AddedToken& token : added) {
    hash.Add(token.id);
    hash.Add(token.content);
    hash.Add(token.special | token.single_word << 1 | token.lstrip << 2 | token.rstrip << 3 |
             token.normalized << 4);
  }
  hash.Add(static_cast<int64_t>(file.split_regexes.size()));
  for (const std::string& regex : file.split_regexes) hash.Add(regex);
  for (const auto* ids : {&file.prefix_ids, &file.suffix_ids}) {
    hash.Add(static_cast<int64_t>(ids->size()));
    for (const int32_t id : *ids) hash.Add(id);
  }
  hash.Add(file.nfc | file.ignore_merges << 1);
  return hash.Hex();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(
    const std::string& tokenizer_json_path) {
  TANDEM_ASSIGN_OR_RETURN(const std::string json,
                          ReadFile(tokenizer_json_path, kMaxTokenizerFileBytes));
  auto tokenizer = Parse(json);
  if (!tokenizer.ok()) {
    return absl::Status(tokenizer.status().code(),
                        fmt::format("{}: {}", tokenizer_json_path, MessageOf(tokenizer.status())));
  }
  return tokenizer;
}

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Parse(std::string_view json) {
  TANDEM_ASSIGN_OR_RETURN(TokenizerFile file, ParseTokenizerFile(json));
  std::vector<SplitPattern> splits;
  for (size_t i = 0; i < file.split_regexes.size(); ++i) {
    auto split = SplitPattern::Compile(file.split_regexes[i]);
    if (!split.ok()) {
      return InvalidArgument("tokenizer.json: pre_tokenizer.pretokenizers[{}].pattern.Regex: {}", i,
                             MessageOf(split.status()));
    }
    splits.push_back(*std::move(split));
  }
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::move(file), std::move(splits)));
}

Tokenizer::Tokenizer(TokenizerFile file, std::vector<SplitPattern> splits)
    : bpe_(file.byte_ids, file.merges),
      splits_(std::move(splits)),
      prefix_ids_(file.prefix_ids),
      suffix_ids_(file.suffix_ids),
      raw_matcher_(Select(file, false)),
      normalized_matcher_(Select(file, true)),
      nfc_(file.nfc),
      digest_(DigestOf(file)) {
  AddTokens(file);
}

void Tokenizer::AddTokens(const TokenizerFile& file) {
  int32_t max_id = file.vocab.back().id;  // never empty: it has the 256 byte symbols
  for (const AddedToken& token : file.added_tokens) max_id = std::max(max_id, token.id);
  tokens_.resize(static_cast<size_t>(max_id) + 1);
  id_by_token_.reserve(file.vocab.size() + file.added_tokens.size());
  bpe_.ReserveWholePieces(file.vocab.size());
  for (const auto& [text, id] : file.vocab) {
    id_by_token_.emplace(text, id);
    tokens_[id] = {DecodedBytes(text), true, false};
    if (auto bytes = BytesOfSymbols(text); bytes.has_value()) {
      bpe_.AddWholePiece(*std::move(bytes), id, file.ignore_merges);
    }
  }
  for (const AddedToken& token : file.added_tokens) {
    id_by_token_.emplace(token.content, token.id);
    tokens_[token.id] = {DecodedBytes(token.content), true, token.special};
    max_token_bytes_ = std::max(max_token_bytes_, token.content.size());
  }
  for (const Token& token : tokens_) {
    max_token_bytes_ = std::max(max_token_bytes_, token.bytes.size());
  }
}

absl::Status Tokenizer::Encode(std::span<const TextSegment> segments,
                               std::vector<int32_t>* ids) const {
  std::string text;
  std::vector<TextRange> special;
  for (size_t i = 0; i < segments.size(); ++i) {
    const TextSegment& segment = segments[i];
    if (segment.text.size() > kMaxTextBytes - text.size()) {
      return InvalidArgument("text is over {} bytes", kMaxTextBytes);
    }
    if (const auto bad = FindInvalidUtf8(segment.text); bad.has_value()) {
      return InvalidArgument("text is not valid UTF-8 at byte {}", text.size() + *bad);
    }
    if (segment.parse_special && !segment.text.empty()) {
      special.emplace_back(text.size(), text.size() + segment.text.size());
    }
    text += segment.text;
  }
  return EncodeText(text, special, ids);
}

absl::Status Tokenizer::Encode(std::string_view text, bool parse_special,
                               std::vector<int32_t>* ids) const {
  if (text.size() > kMaxTextBytes) return InvalidArgument("text is over {} bytes", kMaxTextBytes);
  if (const auto bad = FindInvalidUtf8(text); bad.has_value()) {
    return InvalidArgument("text is not valid UTF-8 at byte {}", *bad);
  }
  const TextRange whole{0, text.size()};
  return EncodeText(text, std::span(&whole, parse_special ? 1 : 0), ids);
}

absl::Status Tokenizer::EncodeText(std::string_view text, std::span<const TextRange> special,
                                   std::vector<int32_t>* ids) const {
  const size_t size_before = ids->size();
  const auto encode = [&]() -> absl::Status {
    size_t pos = 0;
    for (const AddedTokenMatch& match : raw_matcher_.Find(text, special)) {
      TANDEM_RETURN_IF_ERROR(EncodeRaw(text.substr(pos, match.begin - pos), pos, special, ids));
      ids->push_back(match.id);
      pos = match.end;
    }
    return EncodeRaw(text.substr(pos), pos, special, ids);
  };
  absl::Status status = encode();
  if (!status.ok()) ids->resize(size_before);
  return status;
}

namespace {

// Where the ranges `special` of a text lie after the part of it that starts at `offset` and is
// `raw_size` long was normalised to `size` bytes. What normalisation changed stays special only if
// all of it was, in one range.
std::vector<TextRange> MapRanges(std::span<const TextRange> special, size_t offset, size_t raw_size,
                                 std::span<const NfcChange> changes) {
  std::vector<TextRange> mapped;
  for (const TextRange& range : special) {
    if (range.second <= offset || range.first >= offset + raw_size) continue;
    size_t begin = std::max(range.first, offset) - offset;
    size_t end = std::min(range.second, offset + raw_size) - offset;
    // Shrink the range to the borders of changes that it cuts, then shift its ends.
    ptrdiff_t begin_shift = 0;
    ptrdiff_t end_shift = 0;
    for (const NfcChange& change : changes) {
      const ptrdiff_t shift =
          static_cast<ptrdiff_t>(change.out_end) - static_cast<ptrdiff_t>(change.in_end);
      if (change.in_begin < begin && begin < change.in_end) begin = change.in_end;
      if (change.in_begin < end && end < change.in_end) end = change.in_begin;
      if (change.in_end <= begin) begin_shift = shift;
      if (change.in_end <= end) end_shift = shift;
    }
    if (begin < end) mapped.emplace_back(begin + begin_shift, end + end_shift);
  }
  return mapped;
}

}  // namespace

absl::Status Tokenizer::EncodeRaw(std::string_view raw, size_t offset,
                                  std::span<const TextRange> special,
                                  std::vector<int32_t>* ids) const {
  if (raw.empty()) return absl::OkStatus();
  std::string normalized;
  std::string_view text = raw;
  std::vector<NfcChange> changes;
  if (nfc_ && !IsSurelyNfc(raw)) {
    normalized = ToNfc(raw, normalized_matcher_.empty() ? nullptr : &changes);
    text = normalized;
  }
  if (normalized_matcher_.empty()) return EncodePlain(text, ids);
  const std::vector<TextRange> ranges = MapRanges(special, offset, raw.size(), changes);
  size_t pos = 0;
  for (const AddedTokenMatch& match : normalized_matcher_.Find(text, ranges)) {
    TANDEM_RETURN_IF_ERROR(EncodePlain(text.substr(pos, match.begin - pos), ids));
    ids->push_back(match.id);
    pos = match.end;
  }
  return EncodePlain(text.substr(pos), ids);
}

absl::Status Tokenizer::EncodePlain(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<size_t> ends = {text.size()};
  std::vector<size_t> finer, within;
  for (const SplitPattern& split : splits_) {
    size_t begin = 0;
    finer.clear();
    for (const size_t end : ends) {
      within.clear();
      TANDEM_RETURN_IF_ERROR(split.Split(text.substr(begin, end - begin), &within));
      for (const size_t piece_end : within) finer.push_back(begin + piece_end);
      begin = end;
    }
    ends.swap(finer);
  }
  size_t begin = 0;
  for (const size_t end : ends) {
    bpe_.Encode(text.substr(begin, end - begin), ids);
    begin = end;
  }
  return absl::OkStatus();
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (skip_special_tokens && IsSpecial(id)) continue;
    bytes.append(TokenBytes(id));
  }
  std::string text;
  AppendLossyUtf8(bytes, /*final=*/true, &text);
  return text;
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view token) const {
  const auto it = id_by_token_.find(token);
  if (it == id_by_token_.end()) return std::nullopt;
  return it->second;
}

}  // namespace tandem
