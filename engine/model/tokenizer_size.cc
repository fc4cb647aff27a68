#include "engine/model/tokenizer_size.h"

#include <algorithm>
#include <cstdint>

#include "nlohmann/json.hpp"

#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

using nlohmann::json;

constexpr int64_t kMaxId = int64_t{1} << 30;

}  // namespace

absl::StatusOr<int> TokenizerVocabSize(const std::string& model_dir) {
  const std::string path = model_dir + "/tokenizer.json";
  if (!FileExists(path)) return 0;
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{256} << 20));
  // Merges are most of the file and not wanted.
  const auto skip_merges = [](int depth, json::parse_event_t event, json& parsed) {
    return !(depth == 2 && event == json::parse_event_t::key && parsed == "merges");
  };
  const json root = json::parse(text, skip_merges, false);
  if (!root.is_object() || !root.contains("model") || !root["model"].is_object() ||
      !root["model"].contains("vocab") || !root["model"]["vocab"].is_object()) {
    return InvalidArgument("{}: must be a JSON object with model.vocab", path);
  }
  int64_t largest = -1;
  const auto take = [&](const json& id) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= kMaxId) {
      return false;
    }
    largest = std::max(largest, id.get<int64_t>());
    return true;
  };
  for (const json& id : root["model"]["vocab"]) {
    if (!take(id)) return InvalidArgument("{}: model.vocab holds an id that is no token id", path);
  }
  if (root.contains("added_tokens") && root["added_tokens"].is_array()) {
    for (const json& token : root["added_tokens"]) {
      if (!token.is_object() || !token.contains("id") || !take(token["id"])) {
        return InvalidArgument("{}: added_tokens holds an entry without a token id", path);
      }
    }
  }
  return static_cast<int>(largest + 1);
}

}  // namespace tandem::engine
