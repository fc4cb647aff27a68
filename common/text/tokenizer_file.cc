#include "common/text/tokenizer_file.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"

#include "common/base/status.h"
#include "common/text/byte_level.h"
#include "common/text/json.h"
#include "common/text/text_map.h"

namespace tandem {
namespace {

using nlohmann::json;
using IdByText = TextMap<int32_t>;

template <typename... Args>
absl::Status Bad(std::string_view path, fmt::format_string<Args...> format, Args&&... args) {
  return InvalidArgument("tokenizer.json: {}: {}", path,
                         fmt::format(format, std::forward<Args>(args)...));
}

// A value as a message shows it: short, whatever it is.
std::string Show(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

const json& Member(const json& object, const char* key) {
  static const json* const null = new json();
  if (!object.is_object()) return *null;
  const auto it = object.find(key);
  return it == object.end() ? *null : *it;
}

// The id in `value`, or -1 if it is none.
int32_t IdOrNone(const json& value) {
  if (!value.is_number_integer() || value < 0 || value >= kMaxTokenIds) return -1;
  return value.get<int32_t>();
}

absl::Status BadId(const json& value, const std::string& path) {
  return Bad(path, "a token id must be an integer from 0 to {}, got {}", kMaxTokenIds - 1,
             Show(value));
}

absl::StatusOr<bool> ReadBool(const json& object, const char* key, const std::string& path) {
  const json& value = Member(object, key);
  if (value.is_null()) return false;
  if (!value.is_boolean()) return Bad(path + "." + key, "must be a boolean, got {}", Show(value));
  return value.get<bool>();
}

// {"type": "<wanted>"} of a component, with a message that says what is supported.
absl::Status CheckType(const json& component, const std::string& path, std::string_view wanted) {
  const json& type = Member(component, "type");
  if (type.is_string() && type.get_ref<const std::string&>() == wanted) return absl::OkStatus();
  return Bad(path, "only type {} is supported, got {}", wanted,
             component.is_object() ? Show(type) : Show(component));
}

absl::Status CheckByteLevel(const json& component, const std::string& path) {
  TANDEM_RETURN_IF_ERROR(CheckType(component, path, "ByteLevel"));
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const json& root, TokenizerFile* file) {
  const std::string path = "pre_tokenizer";
  const json& sequence = Member(root, "pre_tokenizer");
  TANDEM_RETURN_IF_ERROR(CheckType(sequence, path, "Sequence"));
  const json& parts = Member(sequence, "pretokenizers");
  if (!parts.is_array() || parts.size() != 2) {
    return Bad(path + ".pretokenizers", "must be [Split, ByteLevel], got {}", Show(parts));
  }
  const std::string split_path = path + ".pretokenizers[0]";
  const json& split = parts[0];
  TANDEM_RETURN_IF_ERROR(CheckType(split, split_path, "Split"));
  const json& regex = Member(Member(split, "pattern"), "Regex");
  if (!regex.is_string()) {
    return Bad(split_path + ".pattern", "must be {{\"Regex\": \"...\"}}, got {}",
               Show(Member(split, "pattern")));
  }
  if (const json& behavior = Member(split, "behavior"); behavior != "Isolated") {
    return Bad(split_path + ".behavior", "only Isolated is supported, got {}", Show(behavior));
  }
  TANDEM_ASSIGN_OR_RETURN(const bool invert, ReadBool(split, "invert", split_path));
  if (invert) return Bad(split_path + ".invert", "true is not supported");
  file->split_regex = regex.get<std::string>();

  const std::string level_path = path + ".pretokenizers[1]";
  const json& level = parts[1];
  TANDEM_RETURN_IF_ERROR(CheckByteLevel(level, level_path));
  for (const char* key : {"add_prefix_space", "use_regex"}) {
    // Both are true where a ByteLevel pre-tokenizer does not say.
    if (Member(level, key) != false) {
      return Bad(level_path + "." + key, "only false is supported, got {}",
                 Show(Member(level, key)));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadPipeline(const json& root, TokenizerFile* file) {
  const json& normalizer = Member(root, "normalizer");
  if (!normalizer.is_null()) {
    TANDEM_RETURN_IF_ERROR(CheckType(normalizer, "normalizer", "NFC"));
    file->nfc = true;
  }
  TANDEM_RETURN_IF_ERROR(ReadPreTokenizer(root, file));
  TANDEM_RETURN_IF_ERROR(CheckByteLevel(Member(root, "decoder"), "decoder"));
  const json& post = Member(root, "post_processor");
  if (!post.is_null()) TANDEM_RETURN_IF_ERROR(CheckByteLevel(post, "post_processor"));
  return absl::OkStatus();
}

absl::Status CheckModelOptions(const json& model, TokenizerFile* file) {
  // Files written by old versions leave the type out of a BPE model.
  if (!Member(model, "type").is_null()) TANDEM_RETURN_IF_ERROR(CheckType(model, "model", "BPE"));
  const json& dropout = Member(model, "dropout");
  if (!dropout.is_null() && dropout != 0) {
    return Bad("model.dropout", "must be null, got {}", Show(dropout));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json& value = Member(model, key);
    if (!value.is_null() && value != "") {
      return Bad(fmt::format("model.{}", key), "is not supported, got {}", Show(value));
    }
  }
  TANDEM_ASSIGN_OR_RETURN(const bool byte_fallback, ReadBool(model, "byte_fallback", "model"));
  if (byte_fallback) return Bad("model.byte_fallback", "true is not supported");
  TANDEM_ASSIGN_OR_RETURN(file->ignore_merges, ReadBool(model, "ignore_merges", "model"));
  return absl::OkStatus();
}

absl::Status ReadVocab(const json& model, TokenizerFile* file, IdByText* ids) {
  const json& vocab = Member(model, "vocab");
  if (!vocab.is_object()) return Bad("model.vocab", "must be an object, got {}", Show(vocab));
  file->vocab.reserve(vocab.size());
  ids->reserve(vocab.size());
  for (const auto& [text, value] : vocab.items()) {
    const int32_t id = IdOrNone(value);
    if (id < 0) return BadId(value, "model.vocab[" + Show(text) + "]");
    file->vocab.push_back({text, id});
    ids->emplace(text, id);
  }
  std::sort(file->vocab.begin(), file->vocab.end(),
            [](const auto& a, const auto& b) { return a.id < b.id; });
  for (size_t i = 1; i < file->vocab.size(); ++i) {
    const auto& a = file->vocab[i - 1];
    const auto& b = file->vocab[i];
    if (a.id == b.id) {
      return Bad("model.vocab", "{} and {} have the same id {}", Show(a.text), Show(b.text), a.id);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = ids->find(ByteSymbol(static_cast<uint8_t>(byte)));
    if (it == ids->end()) {
      return Bad("model.vocab",
                 "the symbol \"{}\" of byte {:#04x} is missing, so some text has no tokens",
                 ByteSymbol(static_cast<uint8_t>(byte)), byte);
    }
    file->byte_ids[byte] = it->second;
  }
  return absl::OkStatus();
}

// The two halves of a merge, "a b" or ["a", "b"]; nullopt if it is neither.
std::optional<std::pair<std::string_view, std::string_view>> ReadMerge(const json& merge) {
  if (merge.is_string()) {
    const std::string_view text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
             merge[1].is_string()) {
    return std::pair<std::string_view, std::string_view>(merge[0].get_ref<const std::string&>(),
                                                         merge[1].get_ref<const std::string&>());
  }
  return std::nullopt;
}

absl::Status ReadMerges(const json& model, const IdByText& ids, TokenizerFile* file) {
  const json& merges = Member(model, "merges");
  if (!merges.is_array()) return Bad("model.merges", "must be an array, got {}", Show(merges));
  file->merges.reserve(merges.size());
  std::string joined;
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto path = [i] { return fmt::format("model.merges[{}]", i); };
    const auto halves = ReadMerge(merges[i]);
    if (!halves.has_value() || halves->first.empty() || halves->second.empty()) {
      return Bad(path(), "must be \"left right\" or [\"left\", \"right\"], got {}",
                 Show(merges[i]));
    }
    joined.assign(halves->first).append(halves->second);
    int32_t found[3];
    int n = 0;
    for (const std::string_view text : {halves->first, halves->second, std::string_view(joined)}) {
      const auto it = ids.find(text);
      if (it == ids.end()) return Bad(path(), "{} is not in model.vocab", Show(json(text)));
      found[n++] = it->second;
    }
    file->merges.push_back({found[0], found[1], found[2]});
  }
  return absl::OkStatus();
}

absl::StatusOr<AddedToken> ReadAddedToken(const json& value, const std::string& path) {
  if (!value.is_object()) return Bad(path, "must be an object, got {}", Show(value));
  AddedToken token;
  token.id = IdOrNone(Member(value, "id"));
  if (token.id < 0) return BadId(Member(value, "id"), path + ".id");
  const json& content = Member(value, "content");
  if (!content.is_string() || content == "") {
    return Bad(path + ".content", "must be a string that is not empty, got {}", Show(content));
  }
  token.content = content.get<std::string>();
  TANDEM_ASSIGN_OR_RETURN(token.special, ReadBool(value, "special", path));
  TANDEM_ASSIGN_OR_RETURN(token.single_word, ReadBool(value, "single_word", path));
  TANDEM_ASSIGN_OR_RETURN(token.lstrip, ReadBool(value, "lstrip", path));
  TANDEM_ASSIGN_OR_RETURN(token.rstrip, ReadBool(value, "rstrip", path));
  TANDEM_ASSIGN_OR_RETURN(token.normalized, ReadBool(value, "normalized", path));
  return token;
}

absl::Status ReadAddedTokens(const json& root, const IdByText& ids, TokenizerFile* file) {
  const json& added = Member(root, "added_tokens");
  if (added.is_null()) return absl::OkStatus();
  if (!added.is_array()) return Bad("added_tokens", "must be an array, got {}", Show(added));
  absl::flat_hash_map<int32_t, std::string> text_by_id;
  for (const auto& token : file->vocab) text_by_id.emplace(token.id, token.text);
  TextMap<int32_t> seen;
  for (size_t i = 0; i < added.size(); ++i) {
    const std::string path = fmt::format("added_tokens[{}]", i);
    TANDEM_ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken(added[i], path));
    if (!seen.emplace(token.content, token.id).second) {
      return Bad(path + ".content", "{} is given twice", Show(token.content));
    }
    if (const auto it = ids.find(token.content); it != ids.end() && it->second != token.id) {
      return Bad(path + ".id", "is {}, but model.vocab has {} as {}", token.id, Show(token.content),
                 it->second);
    }
    const auto [it, is_new] = text_by_id.emplace(token.id, token.content);
    if (!is_new && it->second != token.content) {
      return Bad(path + ".id", "{} is the id of {} already", token.id, Show(it->second));
    }
    file->added_tokens.push_back(std::move(token));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json_text) {
  TANDEM_ASSIGN_OR_RETURN(const json root, ParseJson(json_text, "tokenizer.json"));
  if (!root.is_object()) return Bad("$", "must be an object, got {}", Show(root));
  TokenizerFile file;
  const json& model = Member(root, "model");
  if (!model.is_object()) return Bad("model", "must be an object, got {}", Show(model));
  TANDEM_RETURN_IF_ERROR(CheckModelOptions(model, &file));
  TANDEM_RETURN_IF_ERROR(ReadPipeline(root, &file));
  IdByText ids;
  TANDEM_RETURN_IF_ERROR(ReadVocab(model, &file, &ids));
  TANDEM_RETURN_IF_ERROR(ReadMerges(model, ids, &file));
  TANDEM_RETURN_IF_ERROR(ReadAddedTokens(root, ids, &file));
  return file;
}

}  // namespace tandem
