#include "common/base/checkpoint_quantisation.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "nlohmann/json.hpp"

#include "common/base/config_reader.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem {
namespace {

using nlohmann::json;
using Method = CheckpointQuantisation::Method;

constexpr std::string_view kInstead =
    "take the model's bf16 checkpoint, of which scripts/quantize makes a 4-bit one, or one with "
    "4-bit GPTQ or AWQ (gemm) weights";
constexpr std::array kGroupSizes = {-1, 32, 64, 128};
constexpr char kGptqFile[] = "quantize_config.json";
constexpr char kAwqFile[] = "quant_config.json";

void Refuse(ConfigReader* reader, const std::string& kind) {
  reader->Fail(kind, fmt::format("weights are not supported; {}", kInstead));
}

// The first of two names that is there: AutoAWQ's own file has others than config.json.
const char* KeyOf(const ConfigReader& reader, const char* key, const char* other) {
  return !reader.Has(key) && reader.Has(other) ? other : key;
}

// Lower case, as tools write names in both.
std::string Name(ConfigReader* reader, const char* key, std::string fallback) {
  return absl::AsciiStrToLower(reader->String(key, std::move(fallback)));
}

// "gptq" or "awq", or an error.
std::string ReadMethod(std::string_view fallback, ConfigReader* reader) {
  if (reader->Bool("load_in_4bit", false) || reader->Bool("load_in_8bit", false)) {
    Refuse(reader, "bitsandbytes");
    return "";
  }
  const std::string method = Name(reader, "quant_method", std::string(fallback));
  if (method == "gptq" || method == "awq" || !reader->status().ok()) return method;
  if (method == "gguf") {
    Refuse(reader, "GGUF");
  } else if (method.find("marlin") != std::string::npos) {
    Refuse(reader, "Marlin-packed");
  } else if (method.empty()) {
    reader->Fail("quant_method", "is missing");
  } else {
    Refuse(reader, method);
  }
  return "";
}

void ReadGptq(ConfigReader* reader, CheckpointQuantisation* out) {
  out->method = Method::kGptq;
  out->symmetric = reader->Bool("sym", true);
  out->act_order = reader->Bool("desc_act", false);
  // GPTQModel calls it format in its own file.
  const char* key = KeyOf(*reader, "checkpoint_format", "format");
  const std::string format = Name(reader, key, "gptq");
  if (format == "marlin" || reader->Bool("is_marlin_format", false)) {
    Refuse(reader, "Marlin-packed GPTQ");
  } else if (format != "gptq" && format != "gptq_v2") {
    Refuse(reader, fmt::format("{} \"{}\": GPTQ", key, format));
  }
  out->zeros_less_one = format == "gptq";
  if (!reader->Has("dynamic") || !(*reader)["dynamic"].is_object()) return;
  for (const auto& [pattern, value] : (*reader)["dynamic"].items()) {
    // Those with "-:" only name layers that are left as they were.
    if (!pattern.starts_with("-:")) Refuse(reader, "\"dynamic\" (another format for some layers)");
  }
}

void ReadAwq(ConfigReader* reader, CheckpointQuantisation* out) {
  out->method = Method::kAwq;
  const std::string version = Name(reader, "version", "gemm");
  const std::string backend = Name(reader, "backend", "autoawq");
  if (version == "marlin") {
    Refuse(reader, "Marlin-packed AWQ");
  } else if (version != "gemm") {
    Refuse(reader, fmt::format("AWQ {}", version));
  } else if (backend != "autoawq") {
    Refuse(reader, fmt::format("AWQ of {}", backend));
  }
}

}  // namespace

absl::StatusOr<CheckpointQuantisation> CheckpointQuantisation::Parse(const json& config,
                                                                     std::string_view fallback,
                                                                     const std::string& origin) {
  if (!config.is_object()) return InvalidArgument("{}: must be a JSON object", origin);
  ConfigReader reader(config, origin);
  CheckpointQuantisation out;
  const std::string method = ReadMethod(fallback, &reader);
  if (!reader.status().ok()) return reader.status();
  const int bits = reader.Int(KeyOf(reader, "bits", "w_bit"), std::nullopt, 1, 64);
  if (!reader.status().ok()) return reader.status();
  if (bits != kBits) Refuse(&reader, fmt::format("{}-bit {}", bits, absl::AsciiStrToUpper(method)));
  if (method == "gptq") {
    ReadGptq(&reader, &out);
  } else {
    ReadAwq(&reader, &out);
  }
  const char* group_size = KeyOf(reader, "group_size", "q_group_size");
  out.group_size = reader.Int(group_size, 128, -1, 1 << 20);
  if (std::find(kGroupSizes.begin(), kGroupSizes.end(), out.group_size) == kGroupSizes.end()) {
    reader.Fail(group_size,
                fmt::format("{} is not supported; 32, 64, 128 and -1 are", out.group_size));
  }
  if (!reader.status().ok()) return reader.status();
  return out;
}

absl::StatusOr<std::optional<CheckpointQuantisation>> CheckpointQuantisation::LoadFile(
    const std::string& model_dir) {
  const std::vector<std::string> files = Files(model_dir);
  if (files.empty()) return std::nullopt;
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(files.front(), size_t{1} << 20));
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return InvalidArgument("{}: not valid JSON", files.front());
  TANDEM_ASSIGN_OR_RETURN(
      CheckpointQuantisation found,
      Parse(root, files.front().ends_with(kGptqFile) ? "gptq" : "awq", files.front()));
  return found;
}

std::vector<std::string> CheckpointQuantisation::Files(const std::string& model_dir) {
  std::vector<std::string> files;
  for (const char* name : {kGptqFile, kAwqFile}) {
    const std::string path = model_dir + "/" + name;
    if (FileExists(path)) files.push_back(path);
  }
  return files;
}

std::string CheckpointQuantisation::Describe() const {
  std::string text = fmt::format("{}, {} bits, ", method == Method::kGptq ? "GPTQ" : "AWQ", kBits);
  text += group_size > 0 ? fmt::format("groups of {}", group_size) : "one group";
  if (method == Method::kAwq) return text;
  text +=
      symmetric ? ", symmetric" : fmt::format(", asymmetric ({})", zeros_less_one ? "v1" : "v2");
  return text + (act_order ? ", act-order" : "");
}

}  // namespace tandem
