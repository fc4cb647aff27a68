#include "common/base/model_config.h"

#include <algorithm>
#include <limits>

#include "nlohmann/json.hpp"

#include "common/base/config_reader.h"
#include "common/base/file.h"
#include "common/base/model_family.h"
#include "common/base/rope_reader.h"
#include "common/base/status.h"

namespace tandem {
namespace {

using nlohmann::json;

void ReadEos(const json& value, int vocab_size, ConfigReader* reader, std::vector<int32_t>* ids) {
  const json list = value.is_array() ? value : json::array({value});
  for (const json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      reader->Fail("eos_token_id", fmt::format("must be ids in [0, {})", vocab_size));
      return;
    }
    ids->push_back(id.get<int32_t>());
  }
}

// transformers 5 writes `dtype`, older versions `torch_dtype`.
void ReadDType(ConfigReader* reader, ModelConfig* config) {
  const char* key = reader->Has("dtype") ? "dtype" : "torch_dtype";
  const std::string dtype = reader->String(key, "bfloat16");
  for (DType known : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (dtype == DTypeName(known)) {
      config->checkpoint_dtype = known;
      return;
    }
  }
  reader->Fail(key, fmt::format("\"{}\": supported are bfloat16, float16, float32", dtype));
}

// The family that the file names; null after an error.
const ModelFamily* ReadFamily(ConfigReader* reader) {
  const std::string model_type = reader->String("model_type", "");
  std::string architecture;
  if (reader->Has("architectures")) {
    const json& list = (*reader)["architectures"];
    if (!list.is_array() || list.empty() || !list[0].is_string()) {
      reader->Fail("architectures",
                   fmt::format("must be a list with one name, got {}", ConfigReader::Show(list)));
      return nullptr;
    }
    architecture = list[0].get<std::string>();
  }
  const ModelFamily* family = FindModelFamily(architecture, model_type);
  if (family == nullptr) {
    reader->Fail("architectures",
                 fmt::format("\"{}\" (model_type \"{}\") is not supported; Tandem serves {}",
                             architecture, model_type, KnownModelFamilies()));
  } else if (!model_type.empty() && model_type != family->model_type) {
    reader->Fail("model_type", fmt::format("\"{}\" does not go with architecture {}, whose "
                                           "model_type is \"{}\"",
                                           model_type, family->architecture, family->model_type));
    return nullptr;
  }
  return family;
}

void ReadSizes(const ModelFamily& family, ConfigReader* reader, ModelConfig* config) {
  config->vocab_size = reader->Int("vocab_size", std::nullopt, 1, 1 << 22);
  config->hidden_size = reader->Int("hidden_size", std::nullopt, 1, 1 << 17);
  config->intermediate_size = reader->Int("intermediate_size", std::nullopt, 1, 1 << 20);
  config->num_layers = reader->Int("num_hidden_layers", std::nullopt, 1, 1024);
  config->num_heads = reader->Int("num_attention_heads", std::nullopt, 1, 1024);
  config->num_kv_heads = reader->Int("num_key_value_heads", config->num_heads, 1, 1024);
  config->max_position_embeddings =
      reader->Int("max_position_embeddings", family.max_position_embeddings, 1, 1 << 26);
  if (!reader->status().ok()) return;
  if (config->num_heads % config->num_kv_heads != 0) {
    reader->Fail("num_key_value_heads", fmt::format("{} must divide num_attention_heads {}",
                                                    config->num_kv_heads, config->num_heads));
  }
  const bool derived = !reader->Has("head_dim") && family.head_dim == 0;
  if (derived && config->hidden_size % config->num_heads != 0) {
    reader->Fail("hidden_size", fmt::format("{} is not a multiple of num_attention_heads {}; give "
                                            "head_dim if heads have another size",
                                            config->hidden_size, config->num_heads));
  }
  config->head_dim = reader->Int(
      "head_dim", derived ? config->hidden_size / config->num_heads : family.head_dim, 2, 1024);
  if (config->head_dim % 2 != 0) {
    reader->Fail("head_dim", fmt::format("{} must be even for rotary embedding", config->head_dim));
  }
}

// Attention here is over the whole context; a window that the longest sequence fits in is none.
void CheckNoWindow(const ModelFamily& family, const ModelConfig& config, ConfigReader* reader) {
  if (family.has_use_sliding_window && reader->Bool("use_sliding_window", false)) {
    reader->Fail("use_sliding_window", "true is not supported; full attention only");
  }
  if (family.sliding_window > 0 && !reader->IsNull("sliding_window")) {
    const int window = reader->Int("sliding_window", family.sliding_window, 1, 1 << 26);
    if (window < config.max_position_embeddings) {
      reader->Fail(
          "sliding_window",
          fmt::format("{} is not supported (full attention only); null switches it off", window));
    }
  }
  if (!reader->Has("layer_types")) return;
  const json& types = (*reader)["layer_types"];
  for (const json& type : types) {
    if (type == "full_attention") continue;
    reader->Fail("layer_types", fmt::format("has {}; only \"full_attention\" is supported",
                                            ConfigReader::Show(type)));
  }
}

void ReadParts(const ModelFamily& family, ConfigReader* reader, ModelConfig* config) {
  const bool attention_bias = family.reads_attention_bias && reader->Bool("attention_bias", false);
  config->qkv_bias = family.qkv_bias || attention_bias;
  config->output_bias = attention_bias;
  config->mlp_bias = family.reads_mlp_bias && reader->Bool("mlp_bias", false);
  config->qk_norm = family.qk_norm;
  config->tie_word_embeddings = reader->Bool("tie_word_embeddings", false);
  config->rms_norm_eps = static_cast<float>(reader->Number("rms_norm_eps", 1e-6, 0.0, 1.0));
  const std::string act = reader->String("hidden_act", "silu");
  if (act != "silu") reader->Fail("hidden_act", fmt::format("\"{}\": only silu is supported", act));
}

void ReadQuantisation(ConfigReader* reader, ModelConfig* config) {
  if (!reader->Has("quantization_config")) return;
  absl::StatusOr<CheckpointQuantisation> found = CheckpointQuantisation::Parse(
      (*reader)["quantization_config"], "", reader->origin() + ": quantization_config");
  if (found.ok()) config->quantisation = *found;
  reader->Take(found.status());
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& model_dir) {
  TANDEM_RETURN_IF_ERROR(CheckModelDir("--model", model_dir));
  const std::string path = model_dir + "/config.json";
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{16} << 20));
  TANDEM_ASSIGN_OR_RETURN(ModelConfig config, Parse(text, path));
  if (!config.quantisation.has_value()) {
    TANDEM_ASSIGN_OR_RETURN(config.quantisation, CheckpointQuantisation::LoadFile(model_dir));
  }
  return config;
}

absl::StatusOr<ModelConfig> ModelConfig::Parse(const std::string& text, const std::string& origin) {
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return InvalidArgument("{}: not valid JSON", origin);
  if (!root.is_object()) return InvalidArgument("{}: must be a JSON object", origin);
  ConfigReader reader(root, origin);
  const ModelFamily* family = ReadFamily(&reader);
  if (!reader.status().ok()) return reader.status();
  ModelConfig config;
  config.architecture = std::string(family->architecture);
  ReadSizes(*family, &reader, &config);
  ReadParts(*family, &reader, &config);
  CheckNoWindow(*family, config, &reader);
  ReadDType(&reader, &config);
  ReadRope(&reader, &config);
  ReadQuantisation(&reader, &config);
  if (reader.Has("eos_token_id")) {
    ReadEos(root["eos_token_id"], config.vocab_size, &reader, &config.eos_token_ids);
  }
  if (!reader.status().ok()) return reader.status();
  return config;
}

int64_t ModelConfig::NumParameters() const {
  const int64_t h = hidden_size, inner = intermediate_size, q = int64_t{num_heads} * head_dim,
                kv = int64_t{num_kv_heads} * head_dim;
  const int64_t attention = h * q + 2 * h * kv + q * h + (qkv_bias ? q + 2 * kv : 0) +
                            (output_bias ? h : 0) + (qk_norm ? 2 * head_dim : 0);
  const int64_t mlp = 3 * h * inner + (mlp_bias ? 2 * inner + h : 0);
  const int64_t embedding = int64_t{vocab_size} * h * (tie_word_embeddings ? 1 : 2);
  return num_layers * (attention + mlp + 2 * h) + h + embedding;
}

int64_t ModelConfig::KeptWeightBytes(DType dtype) const {
  const auto element = static_cast<int64_t>(DTypeSize(dtype));
  if (!quantisation.has_value()) return NumParameters() * element;
  const int64_t h = hidden_size, inner = intermediate_size, q = int64_t{num_heads} * head_dim,
                kv = int64_t{num_kv_heads} * head_dim;
  int64_t linear = 0, groups = 0;
  const auto add = [&](int64_t outputs, int64_t inputs) {
    const int64_t size = quantisation->group_size < 0 ? inputs : quantisation->group_size;
    linear += num_layers * outputs * inputs;
    groups += num_layers * outputs * ((inputs + size - 1) / size);
  };
  add(q + 2 * kv, h);
  add(h, q);
  add(2 * inner, h);
  add(h, inner);
  return (NumParameters() - linear) * element + linear * CheckpointQuantisation::kBits / 8 +
         groups * static_cast<int64_t>(sizeof(uint32_t));
}

int ModelConfig::MaxModelLen() const {
  const YarnScaling* yarn = std::get_if<YarnScaling>(&rope_scaling);
  if (yarn == nullptr) return max_position_embeddings;
  const double stretched = double{yarn->factor} * yarn->original_max_position_embeddings;
  return std::max(max_position_embeddings,
                  static_cast<int>(std::min(stretched, double{std::numeric_limits<int>::max()})));
}

std::string DescribeRopeScaling(const RopeScaling& scaling) {
  if (const auto* yarn = std::get_if<YarnScaling>(&scaling)) {
    return fmt::format("YaRN, factor {}", yarn->factor);
  }
  if (const auto* llama3 = std::get_if<Llama3Scaling>(&scaling)) {
    return fmt::format("llama3, factor {}", llama3->factor);
  }
  return "none";
}

}  // namespace tandem
