#include "common/base/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "nlohmann/json.hpp"

#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem {
namespace {

using nlohmann::json;

// Reads typed keys of one JSON object; the first error sticks.
class Reader {
 public:
  Reader(const json& object, std::string origin) : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const {
    const auto it = object_.find(key);
    return it != object_.end() && !it->is_null();
  }

  int Int(const char* key, std::optional<int> fallback, int low, int high) {
    if (!Has(key)) return Missing(key, fallback, 0);
    const json& value = object_[key];
    if (!value.is_number_integer() || value.get<double>() < low || value.get<double>() > high) {
      Fail(key, fmt::format("must be an integer in [{}, {}], got {}", low, high, Show(value)));
      return 0;
    }
    return value.get<int>();
  }

  double Number(const char* key, std::optional<double> fallback, double low, double high) {
    if (!Has(key)) return Missing(key, fallback, 0.0);
    const json& value = object_[key];
    const double number = value.is_number() ? value.get<double>() : std::nan("");
    if (!(number >= low && number <= high)) {
      Fail(key, fmt::format("must be a number in [{}, {}], got {}", low, high, Show(value)));
      return 0;
    }
    return number;
  }

  bool Bool(const char* key, bool fallback) {
    if (!Has(key)) return fallback;
    const json& value = object_[key];
    if (!value.is_boolean()) {
      Fail(key, fmt::format("must be true or false, got {}", Show(value)));
      return false;
    }
    return value.get<bool>();
  }

  std::string String(const char* key, std::string fallback) {
    if (!Has(key)) return fallback;
    const json& value = object_[key];
    if (!value.is_string()) {
      Fail(key, fmt::format("must be a string, got {}", Show(value)));
      return "";
    }
    return value.get<std::string>();
  }

  void Fail(std::string_view key, std::string_view what) {
    if (status_.ok()) status_ = InvalidArgument("{}: {} {}", origin_, key, what);
  }

  const json& operator[](const char* key) const { return object_[key]; }
  const absl::Status& status() const { return status_; }

 private:
  template <typename T>
  T Missing(const char* key, std::optional<T> fallback, T zero) {
    if (!fallback.has_value()) Fail(key, "is missing");
    return fallback.value_or(zero);
  }

  static std::string Show(const json& value) {
    std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
    return text.size() > 60 ? text.substr(0, 60) + "..." : text;
  }

  const json& object_;
  const std::string origin_;
  absl::Status status_;
};

void ReadYarn(const json& scaling, const std::string& origin, Reader* outer, ModelConfig* config) {
  if (!scaling.is_object()) return outer->Fail("rope_scaling", "must be an object or null");
  Reader reader(scaling, origin + ": rope_scaling");
  const std::string type = reader.String("rope_type", reader.String("type", ""));
  if (type == "default") return;
  if (type != "yarn") {
    return outer->Fail("rope_scaling",
                       fmt::format("has type \"{}\"; supported are yarn and default", type));
  }
  YarnScaling yarn;
  yarn.factor = static_cast<float>(reader.Number("factor", std::nullopt, 1.0, 1024.0));
  yarn.original_max_position_embeddings =
      reader.Int("original_max_position_embeddings", config->max_position_embeddings, 1, 1 << 26);
  yarn.beta_fast = static_cast<float>(reader.Number("beta_fast", 32.0, 1e-3, 1e6));
  yarn.beta_slow = static_cast<float>(reader.Number("beta_slow", 1.0, 1e-3, 1e6));
  if (reader.Has("attention_factor")) {
    yarn.attention_factor = static_cast<float>(reader.Number("attention_factor", 1.0, 1e-3, 1e3));
  }
  for (const char* key : {"mscale", "mscale_all_dim"}) {
    if (reader.Has(key)) reader.Fail(key, "is not part of Qwen2's YaRN; remove it");
  }
  if (!reader.status().ok()) return outer->Fail("rope_scaling", reader.status().ToString());
  config->yarn = yarn;
}

void ReadEos(const json& value, int vocab_size, Reader* reader, std::vector<int32_t>* ids) {
  const json list = value.is_array() ? value : json::array({value});
  for (const json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      reader->Fail("eos_token_id", fmt::format("must be ids in [0, {})", vocab_size));
      return;
    }
    ids->push_back(id.get<int32_t>());
  }
}

void ReadDType(Reader* reader, ModelConfig* config) {
  const std::string dtype = reader->String("torch_dtype", reader->String("dtype", "bfloat16"));
  for (DType known : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (dtype == DTypeName(known)) {
      config->checkpoint_dtype = known;
      return;
    }
  }
  reader->Fail("torch_dtype",
               fmt::format("\"{}\": supported are bfloat16, float16, float32", dtype));
}

void CheckArchitecture(const json& root, Reader* reader, ModelConfig* config) {
  const std::string model_type = reader->String("model_type", "");
  if (reader->Has("architectures") && root["architectures"].is_array() &&
      !root["architectures"].empty() && root["architectures"][0].is_string()) {
    config->architecture = root["architectures"][0].get<std::string>();
  }
  if (config->architecture.empty() && model_type == "qwen2")
    config->architecture = "Qwen2ForCausalLM";
  if (config->architecture != "Qwen2ForCausalLM" ||
      (!model_type.empty() && model_type != "qwen2")) {
    reader->Fail("architectures",
                 fmt::format("\"{}\" (model_type \"{}\") is not supported; Tandem serves "
                             "Qwen2ForCausalLM checkpoints (Qwen1.5, Qwen2, Qwen2.5)",
                             config->architecture, model_type));
  }
  const std::string act = reader->String("hidden_act", "silu");
  if (act != "silu") reader->Fail("hidden_act", fmt::format("\"{}\": only silu is supported", act));
  if (reader->Bool("use_sliding_window", false)) {
    reader->Fail("use_sliding_window", "true is not supported; full attention only");
  }
  if (reader->Has("quantization_config")) {
    reader->Fail("quantization_config",
                 "is not supported yet; give a bf16, fp16 or fp32 checkpoint");
  }
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& model_dir) {
  TANDEM_RETURN_IF_ERROR(CheckModelDir("--model", model_dir));
  const std::string path = model_dir + "/config.json";
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{16} << 20));
  return Parse(text, path);
}

absl::StatusOr<ModelConfig> ModelConfig::Parse(const std::string& text, const std::string& origin) {
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return InvalidArgument("{}: not valid JSON", origin);
  if (!root.is_object()) return InvalidArgument("{}: must be a JSON object", origin);
  Reader reader(root, origin);
  ModelConfig config;
  CheckArchitecture(root, &reader, &config);
  config.vocab_size = reader.Int("vocab_size", std::nullopt, 1, 1 << 22);
  config.hidden_size = reader.Int("hidden_size", std::nullopt, 1, 1 << 17);
  config.intermediate_size = reader.Int("intermediate_size", std::nullopt, 1, 1 << 20);
  config.num_layers = reader.Int("num_hidden_layers", std::nullopt, 1, 1024);
  config.num_heads = reader.Int("num_attention_heads", std::nullopt, 1, 1024);
  config.num_kv_heads = reader.Int("num_key_value_heads", config.num_heads, 1, 1024);
  config.max_position_embeddings = reader.Int("max_position_embeddings", 32768, 1, 1 << 26);
  config.rms_norm_eps = static_cast<float>(reader.Number("rms_norm_eps", 1e-6, 0.0, 1.0));
  config.rope_theta = reader.Number("rope_theta", 10000.0, 1.0, 1e12);
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  ReadDType(&reader, &config);
  if (!reader.status().ok()) return reader.status();
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.Fail("num_key_value_heads", fmt::format("{} must divide num_attention_heads {}",
                                                   config.num_kv_heads, config.num_heads));
  }
  if (!reader.Has("head_dim") && config.hidden_size % config.num_heads != 0) {
    reader.Fail("hidden_size", fmt::format("{} is not a multiple of num_attention_heads {}",
                                           config.hidden_size, config.num_heads));
  }
  config.head_dim = reader.Int("head_dim", config.hidden_size / config.num_heads, 2, 1024);
  if (config.head_dim % 2 != 0) {
    reader.Fail("head_dim", fmt::format("{} must be even for rotary embedding", config.head_dim));
  }
  // transformers 5 moves rope_theta and the scaling into rope_parameters.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!reader.Has(key)) continue;
    if (root[key].is_object() && root[key].contains("rope_theta")) {
      Reader rope(root[key], origin + ": " + key);
      config.rope_theta = rope.Number("rope_theta", config.rope_theta, 1.0, 1e12);
      if (!rope.status().ok()) return rope.status();
    }
    ReadYarn(root[key], origin, &reader, &config);
  }
  if (reader.Has("eos_token_id")) {
    ReadEos(root["eos_token_id"], config.vocab_size, &reader, &config.eos_token_ids);
  }
  if (!reader.status().ok()) return reader.status();
  return config;
}

int64_t ModelConfig::NumParameters() const {
  const int64_t h = hidden_size, q = int64_t{num_heads} * head_dim,
                kv = int64_t{num_kv_heads} * head_dim;
  const int64_t attention = h * q + q + 2 * (h * kv + kv) + q * h;
  const int64_t mlp = int64_t{3} * h * intermediate_size;
  const int64_t embedding = int64_t{vocab_size} * h * (tie_word_embeddings ? 1 : 2);
  return num_layers * (attention + mlp + 2 * h) + h + embedding;
}

int ModelConfig::MaxModelLen() const {
  if (!yarn.has_value()) return max_position_embeddings;
  const double stretched = double{yarn->factor} * yarn->original_max_position_embeddings;
  return std::max(max_position_embeddings,
                  static_cast<int>(std::min(stretched, double{std::numeric_limits<int>::max()})));
}

}  // namespace tandem
