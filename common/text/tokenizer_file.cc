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
  if (text.size() > 60) {
    text.resize(57);
    text += "...";
  }
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

// What a ByteLevel pre-tokenizer with use_regex cuts by: GPT-2's pattern.
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

absl::StatusOr<std::string> ReadSplit(const json& split, const std::string& path) {
  const json& regex = Member(Member(split, "pattern"), "Regex");
  if (!regex.is_string()) {
    return Bad(path + ".pattern", "must be {{\"Regex\": \"...\"}}, got {}",
               Show(Member(split, "pattern")));
  }
  if (const json& behavior = Member(split, "behavior"); behavior != "Isolated") {
    return Bad(path + ".behavior", "only Isolated is supported, got {}", Show(behavior));
  }
  TANDEM_ASSIGN_OR_RETURN(const bool invert, ReadBool(split, "invert", path));
  if (invert) return Bad(path + ".invert", "true is not supported");
  return regex.get<std::string>();
}

absl::Status ReadByteLevelStep(const json& level, const std::string& path, TokenizerFile* file) {
  TANDEM_RETURN_IF_ERROR(CheckByteLevel(level, path));
  // Both are true where a ByteLevel pre-tokenizer does not say.
  if (const json& prefix = Member(level, "add_prefix_space"); prefix != false) {
    return Bad(path + ".add_prefix_space", "only false is supported, got {}", Show(prefix));
  }
  const json& regex = Member(level, "use_regex");
  if (!regex.is_null() && !regex.is_boolean()) {
    return Bad(path + ".use_regex", "must be a boolean, got {}", Show(regex));
  }
  if (regex != false) file->split_regexes.emplace_back(kByteLevelPattern);
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const json& root, TokenizerFile* file) {
  const std::string path = "pre_tokenizer";
  const json& component = Member(root, "pre_tokenizer");
  if (Member(component, "type") == "ByteLevel") return ReadByteLevelStep(component, path, file);
  TANDEM_RETURN_IF_ERROR(CheckType(component, path, "Sequence"));
  const json& steps = Member(component, "pretokenizers");
  if (!steps.is_array() || steps.empty() || Member(steps.back(), "type") != "ByteLevel") {
    return Bad(path + ".pretokenizers", "must be [Split or Digits, ..., ByteLevel], got {}",
               Show(steps));
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    const std::string step_path = fmt::format("{}.pretokenizers[{}]", path, i);
    const json& type = Member(steps[i], "type");
    if (i + 1 == steps.size()) {
      TANDEM_RETURN_IF_ERROR(ReadByteLevelStep(steps[i], step_path, file));
    } else if (type == "Split") {
      TANDEM_ASSIGN_OR_RETURN(std::string regex, ReadSplit(steps[i], step_path));
      file->split_regexes.push_back(std::move(regex));
    } else if (type == "Digits") {
      TANDEM_ASSIGN_OR_RETURN(const bool each, ReadBool(steps[i], "individual_digits", step_path));
      file->split_regexes.emplace_back(each ? "\\p{N}" : "\\p{N}+");
    } else {
      return Bad(step_path, "only types Split and Digits are supported here, got {}", Show(type));
    }
  }
  return absl::OkStatus();
}

// The ids of {"SpecialToken": {"id": "<name>"}} in `special_tokens` of a TemplateProcessing.
absl::Status AppendSpecialIds(const json& post, const json& piece, const std::string& path,
                              std::vector<int32_t>* ids) {
  const json& name = Member(Member(piece, "SpecialToken"), "id");
  const json& token = name.is_string() ? Member(Member(post, "special_tokens"),
                                                name.get_ref<const std::string&>().c_str())
                                       : name;
  const json& listed = Member(token, "ids");
  if (!listed.is_array()) {
    return Bad(path, "must be a Sequence or a SpecialToken listed in special_tokens, got {}",
               Show(piece));
  }
  for (const json& id : listed) {
    if (IdOrNone(id) < 0) return BadId(id, path);
    ids->push_back(IdOrNone(id));
  }
  return absl::OkStatus();
}

absl::Status ReadTemplateProcessing(const json& post, const std::string& path,
                                    TokenizerFile* file) {
  const json& single = Member(post, "single");
  if (!single.is_array()) return Bad(path + ".single", "must be an array, got {}", Show(single));
  bool behind_text = false;
  for (size_t i = 0; i < single.size(); ++i) {
    if (!Member(single[i], "Sequence").is_null()) {
      if (behind_text) return Bad(path + ".single", "has the text twice");
      behind_text = true;
      continue;
    }
    TANDEM_RETURN_IF_ERROR(AppendSpecialIds(post, single[i], fmt::format("{}.single[{}]", path, i),
                                            behind_text ? &file->suffix_ids : &file->prefix_ids));
  }
  if (!behind_text) return Bad(path + ".single", "must have {{\"Sequence\": ...}}, the text");
  return absl::OkStatus();
}

// ByteLevel only moves offsets, which nobody asks for here.
absl::Status ReadPostProcessor(const json& post, const std::string& path, TokenizerFile* file) {
  const json& type = Member(post, "type");
  if (post.is_null() || type == "ByteLevel") return absl::OkStatus();
  if (type == "TemplateProcessing") return ReadTemplateProcessing(post, path, file);
  const json& steps = Member(post, "processors");
  if (type != "Sequence" || !steps.is_array()) {
    return Bad(path, "only types ByteLevel, TemplateProcessing and Sequence are supported, got {}",
               post.is_object() ? Show(type) : Show(post));
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    if (Member(steps[i], "type") == "Sequence") return Bad(path, "has a Sequence in a Sequence");
    TANDEM_RETURN_IF_ERROR(
        ReadPostProcessor(steps[i], fmt::format("{}.processors[{}]", path, i), file));
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
  return ReadPostProcessor(Member(root, "post_processor"), "post_processor", file);
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
