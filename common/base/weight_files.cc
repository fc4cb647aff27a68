#include "common/base/weight_files.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "nlohmann/json.hpp"

#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem {
namespace {

constexpr char kSingle[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = size_t{256} << 20;
constexpr size_t kMaxShownBytes = 120;  // of a name, which may hold any bytes

}  // namespace

absl::StatusOr<WeightFiles> ListWeightFiles(const std::string& model_dir) {
  WeightFiles out;
  const std::string index = model_dir + "/" + kIndex;
  if (!FileExists(index)) {
    if (!FileExists(model_dir + "/" + kSingle)) {
      return NotFound(
          "{}: holds neither {} nor {}; convert the checkpoint to safetensors, or use "
          "--load-format=dummy for random weights",
          model_dir, kSingle, kIndex);
    }
    out.names.insert(kSingle);
    return out;
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(index, kMaxIndexBytes));
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, false);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    return InvalidArgument("{}: must be a JSON object with an object \"weight_map\"", index);
  }
  for (const auto& [name, file] : root["weight_map"].items()) {
    const std::string value = file.is_string() ? file.get<std::string>() : "";
    if (value.empty() || value.find('/') != std::string::npos || value.front() == '.') {
      return InvalidArgument("{}: weight_map of \"{}\" must be a file name in the same folder",
                             index, absl::CEscape(name.substr(0, kMaxShownBytes)));
    }
    out.names.insert(value);
    out.file_of[name] = value;
  }
  if (out.names.empty()) return InvalidArgument("{}: weight_map is empty", index);
  return out;
}

}  // namespace tandem
