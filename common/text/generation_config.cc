#include "common/text/generation_config.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/json.h"

namespace tandem {
namespace {

using nlohmann::json;

constexpr size_t kMaxGenerationConfigBytes = size_t{1} << 20;
constexpr size_t kMaxEosIds = 1024;

// Reads fields of one object and remembers the first error.
class FieldReader {
 public:
  explicit FieldReader(const json& object) : object_(object) {}

  const absl::Status& status() const { return status_; }

  std::optional<int32_t> Integer(const char* field, int32_t min) {
    const json* value = Find(field);
    return value == nullptr ? std::nullopt : ToInteger(*value, field, min);
  }

  // A number above (or, if `min_allowed`, at least) `min` and at most `max`.
  std::optional<double> Number(const char* field, double min, bool min_allowed, double max) {
    const json* value = Find(field);
    if (value == nullptr) return std::nullopt;
    const double number = value->is_number() ? value->get<double>() : NAN;
    if (std::isfinite(number) && number <= max && (min_allowed ? number >= min : number > min)) {
      return number;
    }
    const std::string upper = std::isinf(max) ? "" : fmt::format(" and at most {}", max);
    Fail(field, fmt::format("a number {} {}{}", min_allowed ? "of at least" : "above", min, upper),
         *value);
    return std::nullopt;
  }

  std::optional<bool> Bool(const char* field) {
    const json* value = Find(field);
    if (value == nullptr) return std::nullopt;
    if (value->is_boolean()) return value->get<bool>();
    Fail(field, "true or false", *value);
    return std::nullopt;
  }

  // One id or a list of ids.
  std::vector<int32_t> Ids(const char* field) {
    std::vector<int32_t> ids;
    const json* value = Find(field);
    if (value == nullptr) return ids;
    if (!value->is_array()) {
      if (const auto id = ToInteger(*value, field, 0)) ids.push_back(*id);
      return ids;
    }
    if (value->size() > kMaxEosIds) Fail(field, fmt::format("at most {} ids", kMaxEosIds), *value);
    for (const json& element : *value) {
      const auto id = ToInteger(element, field, 0);
      if (!id.has_value()) break;
      if (std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
    }
    return ids;
  }

 private:
  const json* Find(const char* field) const {
    const auto it = object_.find(field);
    return it == object_.end() || it->is_null() || !status_.ok() ? nullptr : &*it;
  }

  std::optional<int32_t> ToInteger(const json& value, const char* field, int32_t min) {
    if (value.is_number_integer() && value >= min && value <= std::numeric_limits<int32_t>::max()) {
      return value.get<int32_t>();
    }
    Fail(field, fmt::format("an integer of at least {}", min), value);
    return std::nullopt;
  }

  void Fail(const char* field, const std::string& wanted, const json& value) {
    if (!status_.ok()) return;
    std::string shown = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
    status_ =
        InvalidArgument("generation_config.json: {}: must be {}, got {}", field, wanted, shown);
  }

  const json& object_;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<GenerationDefaults> ParseGenerationConfig(std::string_view text) {
  TANDEM_ASSIGN_OR_RETURN(const json root, ParseJson(text, "generation_config.json"));
  if (!root.is_object()) return InvalidArgument("generation_config.json: must be a JSON object");
  constexpr double kNoMax = std::numeric_limits<double>::infinity();
  FieldReader reader(root);
  GenerationDefaults defaults;
  defaults.eos_token_ids = reader.Ids("eos_token_id");
  defaults.bos_token_id = reader.Integer("bos_token_id", 0);
  defaults.pad_token_id = reader.Integer("pad_token_id", 0);
  defaults.do_sample = reader.Bool("do_sample");
  defaults.temperature = reader.Number("temperature", 0, true, kNoMax);
  defaults.top_p = reader.Number("top_p", 0, false, 1);
  defaults.top_k = reader.Integer("top_k", 0);
  defaults.min_p = reader.Number("min_p", 0, true, 1);
  defaults.repetition_penalty = reader.Number("repetition_penalty", 0, false, kNoMax);
  defaults.max_new_tokens = reader.Integer("max_new_tokens", 1);
  TANDEM_RETURN_IF_ERROR(reader.status());
  return defaults;
}

absl::StatusOr<GenerationDefaults> LoadGenerationConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/generation_config.json";
  if (!FileExists(path)) return GenerationDefaults{};
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxGenerationConfigBytes));
  return ParseGenerationConfig(text);
}

}  // namespace tandem
