#include "common/base/config_reader.h"

#include <cmath>

#include "common/base/status.h"

namespace tandem {

using nlohmann::json;

bool ConfigReader::Has(const char* key) const {
  const auto it = object_.find(key);
  return it != object_.end() && !it->is_null();
}

bool ConfigReader::IsNull(const char* key) const {
  const auto it = object_.find(key);
  return it != object_.end() && it->is_null();
}

int ConfigReader::Int(const char* key, std::optional<int> fallback, int low, int high) {
  if (!Has(key)) {
    if (!fallback.has_value()) Fail(key, "is missing");
    return fallback.value_or(0);
  }
  const json& value = object_[key];
  if (!value.is_number_integer() || value.get<double>() < low || value.get<double>() > high) {
    Fail(key, fmt::format("must be an integer in [{}, {}], got {}", low, high, Show(value)));
    return 0;
  }
  return value.get<int>();
}

double ConfigReader::Number(const char* key, std::optional<double> fallback, double low,
                            double high) {
  if (!Has(key)) {
    if (!fallback.has_value()) Fail(key, "is missing");
    return fallback.value_or(0.0);
  }
  const json& value = object_[key];
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= low && number <= high)) {
    Fail(key, fmt::format("must be a number in [{}, {}], got {}", low, high, Show(value)));
    return 0;
  }
  return number;
}

bool ConfigReader::Bool(const char* key, bool fallback) {
  if (!Has(key)) return fallback;
  const json& value = object_[key];
  if (!value.is_boolean()) {
    Fail(key, fmt::format("must be true or false, got {}", Show(value)));
    return false;
  }
  return value.get<bool>();
}

std::string ConfigReader::String(const char* key, std::string fallback) {
  if (!Has(key)) return fallback;
  const json& value = object_[key];
  if (!value.is_string()) {
    Fail(key, fmt::format("must be a string, got {}", Show(value)));
    return "";
  }
  return value.get<std::string>();
}

void ConfigReader::Fail(std::string_view key, std::string_view what) {
  if (status_.ok()) status_ = InvalidArgument("{}: {} {}", origin_, key, what);
}

std::string ConfigReader::Show(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return text.size() > 60 ? text.substr(0, 60) + "..." : text;
}

}  // namespace tandem
