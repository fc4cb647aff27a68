// Typed keys of one JSON object of a model's configuration. The first error sticks, so that a
// caller reads all keys and asks once.
//
// Not thread-safe. A key that is null counts as missing (but see IsNull).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace tandem {

class ConfigReader {
 public:
  // `origin` begins every message; `object` must outlive this.
  ConfigReader(const nlohmann::json& object, std::string origin)
      : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const;
  bool IsNull(const char* key) const;  // there, and null
  // The value of a key that Has() confirmed.
  const nlohmann::json& operator[](const char* key) const { return object_[key]; }

  // The value, or `fallback` where the key is missing; no fallback: a missing key is an error.
  // Numbers must lie in [low, high]. After an error: 0, false or "".
  int Int(const char* key, std::optional<int> fallback, int low, int high);
  double Number(const char* key, std::optional<double> fallback, double low, double high);
  bool Bool(const char* key, bool fallback);
  std::string String(const char* key, std::string fallback);

  // Records "<origin>: <key> <what>" if there was no error yet.
  void Fail(std::string_view key, std::string_view what);
  // Records an error of a reader of a part of this object.
  void Take(const absl::Status& status) { status_.Update(status); }

  const std::string& origin() const { return origin_; }
  const absl::Status& status() const { return status_; }

  // A value as a message shows it: short, whatever it is.
  static std::string Show(const nlohmann::json& value);

 private:
  const nlohmann::json& object_;
  const std::string origin_;
  absl::Status status_;
};

}  // namespace tandem
